"""`shunted-lit fit`, `validate`, `test` and `predict`: LightningCLI with run folders and resuming."""

import inspect
import json
import logging
import re
import warnings
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from torch.optim import Optimizer

from shunted_lit import data, tasks  # noqa: F401 - once imported, YAML may name their classes without a module path
from shunted_lit.commands.configs import resolve_config_options
from shunted_lit.commands.errors import CommandParser, process_rank
from shunted_lit.prediction.writers import PredictionWriter
from shunted_lit.tasks import BaseTask
from shunted_lit.tasks.base import import_task_class, required_annotation
from shunted_lit.training.checkpoint import AtomicCheckpointIO, RunCheckpoint, RunLogger
from shunted_lit.training.loggers import LOGGERS, check_loggers
from shunted_lit.training.report import RunReport
from shunted_lit.training.resume import (
    OPTIMIZER_ARGUMENTS,
    ResumePlan,
    create_run_folder,
    drop_initial_weights,
    evaluation_settings,
    plan_resume,
    restore_requested,
    run_version,
)
from shunted_lit.training.screen import RunProgressBar, RunSummary

# Description and examples of each command.
HELP = {
    "fit": (
        "Train a model. Each run gets a folder runs/version_N with its config, metrics, pictures and checkpoints.",
        "shunted-lit fit --config configs/neck.yaml\n"
        "  shunted-lit fit --config configs/neck.yaml --data YoloDataModule --data.data my_data/data.yaml\n"
        "  shunted-lit fit --config configs/neck.yaml --ckpt_path last                    # resume the newest run",
    ),
    "validate": (
        "Evaluate a checkpoint on the validation split. Task and data are taken from the checkpoint.",
        "shunted-lit validate --ckpt_path runs/version_0/checkpoints/best.ckpt",
    ),
    "test": (
        "Evaluate a checkpoint like validate; log its scores as test/. Task and data are taken from the checkpoint.",
        "shunted-lit test --ckpt_path runs/version_0/checkpoints/best.ckpt",
    ),
    "predict": (
        "Predict images with a checkpoint; write pictures, and labels in the formats of COCO, YOLO, PNG masks or CSV.",
        "shunted-lit predict --ckpt_path runs/version_0/checkpoints/best.ckpt --data.images photos",
    ),
}

# Messages of Lightning 2.6 about its own deprecated calls, and about intended behaviour of this package.
HIDDEN_WARNINGS = (
    r"LightningCLI's args parameter",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Checkpoint directory .* exists and is not empty",  # a resumed run continues in its folder
    r"Experiment logs directory .* exists and is not empty",
    r"The dirpath has changed",  # a run resumed by path gets a new folder
    r"The number of training batches .* is smaller than the logging interval",  # each epoch is logged
    r"Be aware that when using `ckpt_path`, callbacks",  # evaluation needs no training callbacks
)


def prefer_counts(function: Callable[..., Any]) -> None:
    """Let a parser read `1` as a count where a parameter takes a count or a fraction, not as the fraction 1.0.

    `typing` keeps one object for `int | float` and `float | int`. Which of them comes first in Lightning's annotations
    thus depends on what was imported before, and a parser takes the first that fits.
    """
    annotations = inspect.unwrap(function).__annotations__
    for name, kind in annotations.items():
        if set(get_args(kind)) == {int, float, type(None)}:
            annotations[name] = int | float | None


prefer_counts(Trainer.__init__)


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keep the line breaks of examples."""


class TrainerParser(CommandParser, LightningArgumentParser):
    """LightningCLI's parser, with errors in one line."""


class ShuntedCLI(LightningCLI):
    """LightningCLI with a folder for each run, resuming by `--ckpt_path last`, and a writer of predictions."""

    plan = ResumePlan()
    new_folder: Path | None = None

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Set defaults of a subcommand. Overridden because `add_arguments_to_parser` does not get the subcommand."""
        self.prepared_subcommand = subcommand
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # PredictionWriter writes them
        elif subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # RunReport prints the scores
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        if self.prepared_subcommand == "predict":
            parser.add_lightning_class_args(PredictionWriter, "predictions")
            return
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        defaults = {"filename": "best", "mode": "max", "auto_insert_metric_name": False}
        parser.set_defaults({f"checkpoint.{name}": value for name, value in defaults.items()})
        parser.add_lightning_class_args(RunReport, "report")
        loggers = f"Loggers in addition to metrics.csv: {', '.join(LOGGERS)}, or a list of them."
        parser.add_argument("--loggers", type=str | list[str] | None, default=None, help=loggers)
        parser.add_optimizer_args((Optimizer,))
        parser.add_lr_scheduler_args()
        for name in OPTIMIZER_ARGUMENTS:
            parser.link_arguments(name, f"model.init_args.{name}", compute_fn=to_primitive)
        parser.link_arguments("model", "data.init_args.annotation", compute_fn=required_annotation)
        for name in ("num_classes", "class_names"):
            parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the command line; evaluation without a config takes task and data from its checkpoint."""
        saved = evaluation_settings(args[0], args[1:]) if args[0] in ("validate", "test", "predict") else []
        self.takes_saved_settings = bool(saved)
        super().parse_arguments(parser, [args[0], *saved, *args[1:]])

    def _parse_ckpt_path(self) -> None:
        """Take the arguments of the task from the checkpoint.

        Overrides Lightning's own, which does not report replaced arguments, also replaces what evaluation may change,
        and cannot read checkpoints that were written without the command line.
        """
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        check_sections(config)
        self.plan = plan_resume(subcommand, config)
        config.ckpt_path = self.plan.checkpoint
        if self.plan.checkpoint is None:
            return
        drop_initial_weights(config.model.init_args, self.plan.checkpoint)
        requested = dict(config.model.init_args)
        if self.plan.model_arguments:
            model = {"class_path": config.model.class_path, "dict_kwargs": dict(self.plan.model_arguments)}
            linked = {name: self.plan.model_arguments.get(name) for name in OPTIMIZER_ARGUMENTS if name in config}
            self.config = self.parser.parse_object({subcommand: {"model": model, **linked}}, self.config)
        model = self.config[subcommand].model
        changeable = import_task_class(model).evaluation_settings if self.takes_saved_settings else ()
        restore_requested(model.init_args, requested, changeable)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        if self.subcommand == "predict" or trainer.logger is False:  # there is no run folder for config.yaml
            self.save_config_callback = None
        if getattr(self.datamodule, "num_workers", 0) is None:  # our choice, which users need not change
            warnings.filterwarnings("ignore", ".* does not have many workers")
        kwargs |= {"callbacks": add_screen(trainer), "enable_model_summary": bool(trainer.enable_model_summary)}
        if self.subcommand == "predict":
            return super().instantiate_trainer(logger=False, **kwargs)
        self.model.check_data(self.datamodule)
        self._check_num_classes()
        config.checkpoint.monitor = config.checkpoint.monitor or self.model.monitor
        check_loggers(names := as_list(config.loggers))
        if trainer.logger is not False and not trainer.fast_dev_run:
            run_logger = self._create_run_logger(Path(trainer.default_root_dir or "runs"))
            named = [LOGGERS[name](Path(run_logger.log_dir)) for name in names] if process_rank() == 0 else []
            further = [logger for logger in as_list(trainer.logger) if isinstance(logger, Logger)]
            kwargs["logger"] = [run_logger, *named, *further]
        plugins = as_list(trainer.plugins)
        if self.subcommand == "fit" and not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except TypeError as error:
            if "`devices`" not in str(error):
                raise
            raise ValueError(f"{error} Got `trainer.devices` {trainer.devices}.") from error

    def _check_num_classes(self) -> None:
        requested = self.config[self.subcommand].model.init_args.get("num_classes")
        if self.subcommand == "fit" and requested not in (None, self.datamodule.num_classes):
            raise ValueError(
                f"`model.num_classes` must be the number of classes of the data, {self.datamodule.num_classes}, got "
                f"{requested}; leave it out."
            )

    def _create_run_logger(self, root: Path) -> RunLogger:
        """Return the logger of the continued run, or of a new one, whose folder rank 0 creates."""
        if self.plan.run_folder:
            if (self.plan.run_folder / "config.yaml").is_file():  # keep the config with which the run started
                self.save_config_kwargs["config_filename"] = "config_resumed.yaml"
            return RunLogger(root, run_version(self.plan.run_folder), self.plan.steps_done)
        if process_rank() == 0:
            self.new_folder = create_run_folder(root)
        return RunLogger(root, run_version(self.new_folder) if self.new_folder else None)

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the Trainer; remove the new run folder if an error leaves it empty."""
        try:
            super()._run_subcommand(subcommand)
        except BaseException:
            if self.new_folder and not any(self.new_folder.iterdir()):
                self.new_folder.rmdir()
            raise


def check_sections(config: Namespace) -> None:
    """Raise ValueError for a section of the config that is not a mapping, and for values that Lightning mishandles."""
    for name in ("trainer", "checkpoint", "report", "predictions"):
        if name in config and not isinstance(config[name], Namespace):
            raise ValueError(f"`{name}` must be a mapping, as in {name}: {{key: value}}, got {config[name]!r}.")
    if config.trainer.check_val_every_n_epoch == 0:
        raise ValueError("`trainer.check_val_every_n_epoch` must be at least 1 or null, got 0.")
    devices = config.trainer.devices
    if isinstance(devices, str) and not re.fullmatch(r"auto|-1|\d+(,\d+)*,?", devices):
        raise ValueError(
            f"`trainer.devices` must be auto, a number of devices, or their indices such as 0,1, got {devices}."
        )


def to_primitive(config: Namespace | None) -> dict[str, Any] | None:
    """Return a class and its arguments as a checkpoint stores them: primitive values and lists."""
    return None if config is None else json.loads(json.dumps(config.as_dict()))


def add_screen(trainer: Namespace) -> list[Any]:
    """Return the callbacks of a Trainer's config with our summary and progress bar, unless the user chose others."""
    callbacks = as_list(trainer.callbacks)
    has_bar = trainer.enable_progress_bar is False or any(isinstance(entry, ProgressBar) for entry in callbacks)
    summary = [RunSummary()] if trainer.enable_model_summary is None else []
    return [*summary, *([] if has_bar else [RunProgressBar()]), *callbacks]


def as_list(value: Any) -> list[Any]:
    """Return a list of the values of an argument that takes one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if entry is not None]


def is_useful(record: logging.LogRecord) -> bool:
    """Return whether a message of Lightning is neither an advertisement nor about what a run does anyway."""
    return not re.search(
        r"litlogger|litmodels|^[TH]PU available: False|^Seed set to|stopped: `max_(epochs|steps)=", record.getMessage()
    )


def run_trainer(args: Sequence[str]) -> ShuntedCLI:
    """Run a command of Lightning's Trainer.

    Args:
        args: words after `shunted-lit`.

    Raises:
        ValueError: an argument or the data are invalid.
        SystemExit: the words cannot be parsed.
    """
    for message in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message)
    for package in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        logging.getLogger(f"lightning.{package}").addFilter(is_useful)
    if logging.getLogger().hasHandlers():  # otherwise each message is printed twice
        logging.getLogger("lightning").handlers.clear()
    subcommands = {
        name: {
            "description": description,
            "epilog": f"examples:\n  {examples}\n\n--config takes YAML files with the same names; later values replace "
            "earlier ones. --model.help=CLASS and\n--data.help=CLASS list the arguments of a task or data module.",
            "usage": f"shunted-lit {name} [--config FILE] [arguments]",
        }
        for name, (description, examples) in HELP.items()
    }
    return ShuntedCLI(
        BaseTask,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},  # the folder is new, and a resumed run has config_resumed.yaml
        parser_kwargs={
            "prog": "shunted-lit",
            "description": "Train, evaluate and predict.",
            "formatter_class": HelpFormatter,
            **subcommands,
        },
        parser_class=TrainerParser,
        auto_configure_optimizers=False,
        args=resolve_config_options(args),
    )


def run_subcommand(subcommand: str, args: Sequence[str]) -> ShuntedCLI:
    """Run one command with the words that follow its name."""
    return run_trainer([subcommand, *args])


fit, validate, test, predict = (partial(run_subcommand, name) for name in ("fit", "validate", "test", "predict"))
