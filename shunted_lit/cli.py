"""The command `shunted-lit`: LightningCLI, and the few commands that are not training."""

import itertools
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from shunted_lit import data, tasks  # noqa: F401 - once imported, YAML may name their classes without a path
from shunted_lit.commands.attention import attention
from shunted_lit.commands.benchmark import benchmark
from shunted_lit.commands.check import check
from shunted_lit.commands.cost import cost
from shunted_lit.commands.export import export
from shunted_lit.commands.shard import shard
from shunted_lit.commands.study import study
from shunted_lit.data.digits import write_digits
from shunted_lit.data.scenes import write_scenes
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.prediction.writers import PredictionWriter, settings_from_checkpoint
from shunted_lit.tasks import BaseTask
from shunted_lit.tasks.base import import_task_class, required_annotation
from shunted_lit.training.checkpoint import (
    LAST,
    AtomicCheckpointIO,
    RunCheckpoint,
    RunLogger,
    find_last_run,
    run_version,
)
from shunted_lit.training.report import RunReport

log = logging.getLogger(__name__)

# Commands that are plain functions: their arguments and help come from signature and docstring.
COMMANDS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "benchmark": benchmark,
    "cost": cost,
    "digits": write_digits,
    "export": export,
    "scenes": write_scenes,
    "study": study,
}

# They take data by the words of `fit`.
COMMANDS_OF_DATA: dict[str, Callable[[list[str]], None]] = {"check": check, "shard": shard}

EPILOG = f"Besides: {', '.join(sorted([*COMMANDS, *COMMANDS_OF_DATA, 'yolo']))}; each tells more by --help."

YOLO_HELP = """usage: shunted-lit yolo yaml --base BASE --out FILE      write a model YAML with the neck in it
       shunted-lit yolo weights --model FILE --out FILE  write a checkpoint of it, with the weights of its base
       shunted-lit yolo train|val|predict|export ...     as Ultralytics' own `yolo ...`, which then knows the neck

The first two tell more by --help. All need Ultralytics (AGPL-3.0): pip install 'shunted-lit[ultralytics]'"""


ANOTHER = (
    "\nAnother process of this run has ended, or can't be reached; its own last words, on its machine, tell why. "
    "--ckpt_path last goes on; predict goes on by the same command."
)
# What stops a run from outside, by the words of torch, gloo and NCCL.
ADVICE = {
    "closed by peer": ANOTHER,
    "reset by peer": ANOTHER,
    "remote process exited": ANOTHER,
    "Timed out waiting": ANOTHER,
    "Connect timeout": ANOTHER,
    "DataLoader worker": "\nA process that loads data died, most often for lack of memory: a smaller data.num_workers "
    "or data.batch_size may help; --ckpt_path last goes on.",
    "out of memory": "\nA smaller data.batch_size with --trainer.accumulate_grad_batches, "
    "--model.grad_checkpointing true, or --trainer.precision bf16-mixed takes less.",
}


def new_version(root: Path) -> int:
    """Makes the first of root/version_0, root/version_1, ... that is not there yet, and returns its number."""
    for number in itertools.count():
        try:
            (root / f"version_{number}").mkdir(parents=True)
        except FileExistsError:  # also where another run was faster just now
            continue
        break
    return number


class ShuntedCLI(LightningCLI):
    """fit, validate and test; each run has a folder of its own, with config.yaml and metrics.csv. predict; writes
    pictures and what other tools read."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        self.prepared = subcommand  # for the next method, which Lightning does not tell
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # they are written, and may be many
        elif subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # RunReport prints the scores
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.prepared == "predict":
            parser.add_lightning_class_args(PredictionWriter, "predictions")
            return
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "best",
                "checkpoint.mode": "max",
                "checkpoint.auto_insert_metric_name": False,
            }
        )
        parser.add_lightning_class_args(RunReport, "report")
        parser.link_arguments("model", "data.init_args.annotation", compute_fn=required_annotation)
        for name in ("num_classes", "class_names"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """predict, validate and test need no config: a checkpoint tells its task, and its data or how they were read.

        Once parsed, `from_checkpoint` says whether settings that differ from its own were asked for.
        """
        words = list(args)
        self.from_checkpoint: list[str] = []
        if words and words[0] in ("predict", "validate", "test"):
            self.from_checkpoint = settings_of_checkpoint(words)
        super().parse_arguments(parser, [*words[:1], *self.from_checkpoint, *words[1:]])

    def _parse_ckpt_path(self) -> None:
        """Hyperparameters in a checkpoint win over config and command line, as in Lightning, which does not say so, nor
        read checkpoints of its Python interface; those which evaluation may change are as asked for."""
        config = self.config[self.config.subcommand]
        for name in ("trainer", "checkpoint", "report", "predictions"):
            if name in config and not isinstance(config[name], Namespace):
                raise ValueError(f"{name} is {config[name]!r}, but settings by name are needed, as in {name}: {{a: 1}}")
        if config.trainer.check_val_every_n_epoch == 0:
            raise ValueError("trainer.check_val_every_n_epoch is 0, but 1 or more, or null, is needed")
        self.goes_on: Path | None = None  # folder of the run, where it is the same run
        self.made: Path | None = None  # a new folder for it
        self.steps_done: int | None = None  # of that run
        if config.ckpt_path == "last" and self.config.subcommand == "fit":
            root = Path(config.trainer.default_root_dir or "runs")
            folder = find_last_run(root)
            config.ckpt_path = None
            if folder and (folder / LAST).is_file():
                self.goes_on, config.ckpt_path = folder, str(folder / LAST)
                log.info("%s: the run goes on", folder)
            else:
                log.warning("%s: there is no last.ckpt of a run yet, so a new one begins", folder or root)
        if config.ckpt_path is None and self.config.subcommand != "fit":
            raise ValueError(f"{self.config.subcommand} needs trained weights: name a checkpoint by --ckpt_path")
        content: dict[str, Any] = {}
        if config.ckpt_path is not None:
            path = Path(config.ckpt_path)
            content = read_checkpoint(path) if path.is_file() else {}
            if content and "pytorch-lightning_version" not in content:
                raise ValueError(f"{config.ckpt_path} holds no run to go on with; --model.weights may start from it")
            if self.goes_on:
                self.steps_done = content["global_step"]
            for name in ("weights", "pretrained"):  # the checkpoint's weights come after them
                if name in config.model.init_args:
                    if config.model.init_args[name]:
                        log.warning("model.%s is not used: the weights are those of %s", name, path)
                    config.model.init_args[name] = None if name == "weights" else False
        asked = dict(config.model.init_args)
        task = config.model.class_path
        hyper, name = content.get("hyper_parameters", {}), task.rpartition(".")[2]
        same = content.get("task", name) == name  # by its name, where no command line has told a path
        found = hyper.get("_class_path", task if same else content.get("task"))
        kept = {name: value for name, value in hyper.items() if not name.startswith("_")}
        if kept and found == task:
            settings = {self.config.subcommand: {"model": {"class_path": found, "dict_kwargs": kept}}}
            self.config = self.parser.parse_object(settings, self.config)
        if found != task:
            raise ValueError(f"the checkpoint is of {found.rpartition('.')[2]}, not of {name}")
        of_data = ("num_classes", "class_names")  # the task compares them itself, when the checkpoint is loaded
        adjustable = import_task_class(config.model).evaluation_settings if self.from_checkpoint else ()
        arguments = self.config[self.config.subcommand].model.init_args
        for name, value in list(arguments.items()):
            if name not in asked or asked[name] == value or name in of_data:
                continue
            if name in adjustable:
                merged = isinstance(value, dict) and isinstance(asked[name], dict)
                arguments[name] = {**value, **asked[name]} if merged else asked[name]
                log.info("model.%s is %s; in training it was %s", name, asked[name], value)
            else:
                log.warning("model.%s is %s, as in the checkpoint, not %s", name, value, asked[name])

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning's; a run that ends before it has written anything leaves no folder."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self.made and not any(self.made.iterdir()):
                self.made.rmdir()
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        if self.subcommand == "predict" or config.trainer.logger is False:  # there is no folder of the run's own
            self.save_config_callback = None
        if self.subcommand == "predict":
            return super().instantiate_trainer(logger=False, **kwargs)
        self.model.check_data(self.datamodule)
        asked = self.config[self.subcommand].model.init_args.get("num_classes")
        if self.subcommand == "fit" and asked not in (None, self.datamodule.num_classes):
            raise ValueError(
                f"model.num_classes is {asked}, but the data have {self.datamodule.num_classes} classes; leave it out"
            )
        config.checkpoint.monitor = config.checkpoint.monitor or self.model.monitor
        trainer = config.trainer
        if trainer.logger is not False and not trainer.fast_dev_run:
            root = Path(trainer.default_root_dir or "runs")
            version: int | None
            if self.goes_on:
                version = run_version(self.goes_on)
                if (self.goes_on / "config.yaml").is_file():  # which stays as it began
                    self.save_config_kwargs["config_filename"] = "config_resumed.yaml"
            else:
                version = new_version(root) if getattr(rank_zero_only, "rank", 0) == 0 else None
                self.made = root / f"version_{version}" if version is not None else None
            loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
            further = [logger for logger in loggers if isinstance(logger, Logger)]
            kwargs["logger"] = [RunLogger(root, version, self.steps_done), *further]
        if self.subcommand == "fit":
            plugins = trainer.plugins if isinstance(trainer.plugins, list) else [trainer.plugins]
            plugins = [plugin for plugin in plugins if plugin is not None]
            if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
                kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)


def yolo(words: list[str]) -> Any:
    """`shunted-lit yolo`: what prepares a YOLO with the neck, and Ultralytics' own command, which then knows it.

    Raises:
        ValueError: Ultralytics is missing or too old, or does not understand the words.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(YOLO_HELP)
        return None
    try:
        from shunted_lit import ultralytics as adapter
    except ImportError as error:
        raise ValueError(str(error)) from error
    from ultralytics import cfg

    commands: dict[str, Callable[..., Any]] = {"yaml": adapter.write_yaml, "weights": adapter.write_weights}
    if words[0] in commands:
        return auto_cli(commands[words[0]], args=words[1:], prog=f"shunted-lit yolo {words[0]}", as_positional=False)
    cfg.ARGV = ["yolo", *words]  # what its entry point reads
    try:
        return cfg.entrypoint()
    except SyntaxError as error:  # which is what it raises for words that it does not know
        raise ValueError(str(error)) from None


def main(args: list[str] | None = None) -> Any:
    """Runs a command line, sys.argv's by default; returns what the command does, a `ShuntedCLI` for Lightning's.

    Raises:
        ValueError, SystemExit: what the user should change.
    """
    quieten()
    words = sys.argv[1:] if args is None else args
    if words and words[0] == "yolo":
        return yolo(words[1:])
    if words and words[0] in COMMANDS_OF_DATA:
        return COMMANDS_OF_DATA[words[0]](words[1:])
    if words and words[0] in COMMANDS:
        return auto_cli(COMMANDS[words[0]], args=words[1:], prog=f"shunted-lit {words[0]}")
    return ShuntedCLI(
        BaseTask,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # the folder is new, and "last" of a resumed run is not this one's
        parser_kwargs={"epilog": EPILOG},
        auto_configure_optimizers=False,
        args=words,
    )


def settings_of_checkpoint(words: list[str]) -> list[str]:
    """Words that set task and data of an evaluation as its checkpoint has them; none where a config does."""
    given = {word.partition("=")[0] for word in words}
    if given & {"-h", "--help", "-c", "--config"}:
        return []
    if words[0] == "predict" and not any(name.startswith("--data") for name in given):
        raise ValueError("predict needs images: name one, or a folder of them, by --data.images")
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--ckpt_path" and (value or i + 1 < len(words)):
            settings = settings_from_checkpoint(value or words[i + 1], predicts=words[0] == "predict")
            return [part for key, setting in settings.items() for part in (f"--{key}", json.dumps(setting))]
    raise ValueError(f"{words[0]} needs trained weights: name a checkpoint by --ckpt_path")


def quieten() -> None:
    """Hides what Lightning 2.6 tells users that they can't change: its own deprecated calls, and an advertisement."""
    for message in (
        r"LightningCLI's args parameter",
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        r"Checkpoint directory .* exists and is not empty",  # a run that goes on in its folder
        r"Experiment logs directory .* exists and is not empty",  # what it holds is kept
        r"The dirpath has changed",  # a resumed run has a folder of its own, on purpose
        r"Be aware that when using `ckpt_path`, callbacks",  # evaluation and prediction need none of training's
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(advertises_nothing)


def advertises_nothing(record: logging.LogRecord) -> bool:
    return not re.search("litlogger|litmodels", record.getMessage())


def command() -> None:
    """The console command: an error of the user's is a line on the terminal and exit code 2, not a traceback."""
    rank = getattr(rank_zero_only, "rank", None) or 0  # what all processes would say, the first one says
    name = f"shunted-lit: rank {rank}" if rank else "shunted-lit"
    logging.basicConfig(format=f"{name}: %(message)s" if rank else "%(message)s")
    level = logging.WARNING if rank else logging.INFO
    logging.getLogger("shunted_lit").setLevel(level)
    logging.getLogger("timm.models._builder").setLevel(level)  # what of a file's weights was used
    try:
        main()
    except (ValueError, OSError, MisconfigurationException, UnpicklingError) as error:
        print(f"{name}: error: {essence(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        advice = next((advice for known, advice in ADVICE.items() if known in str(error)), None)
        if advice is None:
            raise
        print(f"{name}: error: {essence(str(error))} {advice}", file=sys.stderr)
        sys.exit(2)


def essence(message: str) -> str:
    """The message for the user in what a data worker's traceback, or jsonargparse's list of types tried, wraps it."""
    if message.startswith("Caught "):
        message = re.split(r"^[\w.]*(?:Error|Exception): ", message, flags=re.MULTILINE)[-1].strip()
    message = re.sub(r"^\[\S+\.cc:\d+\] |This is typically caused by.*", "", message).strip()  # gloo's
    tried = re.findall(r"^  - (?!Expected a )(.+?)(?=^  - |^Given value)", message, re.MULTILINE | re.DOTALL)
    return tried[0].strip() if tried else message
