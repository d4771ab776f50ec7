"""`shunted-lit check`: all that is wrong with a data set, in one go."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from shunted_lit.data import BaseDataModule
from shunted_lit.data.base import annotation_covers
from shunted_lit.tasks import BaseTask
from shunted_lit.tasks.base import required_annotation

HELP = """Looks at a data set and prints all that is wrong with it: labels, and the headers of images and masks; with
--decode, their pixels as well. In parallel (data.num_workers). A config of `shunted-lit fit` works as it is."""


def data_parser(command: str, description: str, words: Sequence[str]) -> ArgumentParser:
    """Of a command that takes data, by the words and configs of `shunted-lit fit`."""
    parser = ArgumentParser(prog=f"shunted-lit {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="a config, as for fit; may be given repeatedly")
    parser.add_subclass_arguments(BaseDataModule, "data", required=True)
    parser.add_subclass_arguments(BaseTask, "model", required=False, help="tells what to look at: boxes, or masks too")
    for other in ("trainer", "checkpoint", "report", "seed_everything", "ckpt_path", "weights_only"):
        parser.add_argument(f"--{other}", type=Any, help="of fit; not looked at")
    if {word.partition("=")[0] for word in words} & {"--model", "-c", "--config"}:  # else --data.annotation tells
        parser.link_arguments("model", "data.init_args.annotation", compute_fn=required_annotation)
    for name in ("num_classes", "class_names"):  # which a config of fit leaves out
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
    return parser


def parse_data(parser: ArgumentParser, words: Sequence[str]) -> tuple[Any, Any]:
    """The data, and all settings."""
    config = parser.parse_args(list(words))
    wanted, config.model = required_annotation(config.model), None
    data = parser.instantiate(config).data
    if wanted and not annotation_covers(data.annotation, wanted):
        raise ValueError(f"the task learns from {wanted}, but {type(data).__name__} has {data.annotation}")
    return data, config


def faults_of(data: BaseDataModule, decode: bool = False) -> list[str]:
    """All that is wrong with both splits."""
    return [fault for split in ("train", "val") for kind in data.find_faults(split, decode) for fault in kind]


def check(words: Sequence[str]) -> None:
    """The command line.

    Raises:
        ValueError: there are faults; how many. They are printed.
    """
    parser = data_parser("check", HELP, words)
    parser.add_argument("--decode", type=bool, default=False, help="read all pixels, which takes as long as an epoch")
    data, config = parse_data(parser, words)
    faults = faults_of(data, config.decode)
    count = sum(len(dataset) for dataset in data.datasets.values())
    for fault in faults:
        print(fault)
    if faults:
        where = f" in {count} images" if count else ""
        raise ValueError(f"{len(faults)} fault{'' if len(faults) == 1 else 's'}{where}")
    how = "" if config.decode else ", by labels and headers; --decode true reads pixels, too"
    print(f"{count} images, nothing wrong with them{how}")
