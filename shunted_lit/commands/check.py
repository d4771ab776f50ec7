"""`shunted-lit check`: print every error in a data set."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser

from shunted_lit.commands.configs import resolve_config_options
from shunted_lit.commands.errors import CommandParser
from shunted_lit.data import BaseDataModule
from shunted_lit.data.base import annotation_covers
from shunted_lit.tasks import BaseTask
from shunted_lit.tasks.base import required_annotation

DESCRIPTION = """Check a data set and print every error in its labels and in the headers of its images and masks; with
--decode true, also in their pixels. Files are read in parallel (data.num_workers). A config of `shunted-lit fit` can be
used unchanged."""


def data_parser(command: str, description: str, args: Sequence[str]) -> ArgumentParser:
    """Return the parser of a command that takes data with the arguments and configs of `shunted-lit fit`."""
    parser = CommandParser(prog=f"shunted-lit {command}", description=description)
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="config of `fit`; may be repeated")
    parser.add_subclass_arguments(BaseDataModule, "data", required=True)
    parser.add_subclass_arguments(BaseTask, "model", required=False, help="its task selects the labels to check")
    for ignored in ("trainer", "checkpoint", "report", "seed_everything", "ckpt_path", "weights_only"):
        parser.add_argument(f"--{ignored}", type=Any, help="accepted from configs of `fit`; ignored")
    if {word.partition("=")[0] for word in args} & {"--model", "-c", "--config"}:  # otherwise --data.annotation is used
        parser.link_arguments("model", "data.init_args.annotation", compute_fn=required_annotation)
    for name in ("num_classes", "class_names"):  # configs of `fit` leave them out
        parser.link_arguments(f"data.{name}", f"model.init_args.{name}", apply_on="instantiate")
    return parser


def parse_data(parser: ArgumentParser, args: Sequence[str]) -> tuple[BaseDataModule, Any]:
    """Parse a command line; return the data module and all settings.

    Raises:
        ValueError: the data lack the labels that the task needs.
    """
    config = parser.parse_args(resolve_config_options(args))
    needed, config.model = required_annotation(config.model), None
    data = parser.instantiate(config).data
    if needed and not annotation_covers(data.annotation, needed):
        raise ValueError(
            f"the task learns from {needed}, but {type(data).__name__} has {data.annotation}; choose other data or "
            "another task."
        )
    return data, config


def find_all_faults(data: BaseDataModule, decode: bool = False) -> list[str]:
    """Return a message for each error in the training and validation splits, which may share label files."""
    faults = [fault for split in ("train", "val") for kind in data.find_faults(split, decode) for fault in kind]
    return list(dict.fromkeys(faults))


def check(args: Sequence[str]) -> None:
    """Run `shunted-lit check`.

    Args:
        args: words after `shunted-lit check`.

    Raises:
        ValueError: the data have errors, which are printed; the message has their number.
    """
    parser = data_parser("check", DESCRIPTION, args)
    parser.add_argument("--decode", type=bool, default=False, help="also decode all pixels; takes as long as an epoch")
    data, config = parse_data(parser, args)
    faults = find_all_faults(data, config.decode)
    count = sum(len(dataset) for dataset in data.datasets.values())
    for fault in faults:
        print(fault)
    if faults:
        where = f" in {count} images" if count else ""
        raise ValueError(f"found {len(faults)} error{'' if len(faults) == 1 else 's'}{where}.")
    scope = "" if config.decode else " (labels and headers; --decode true also reads pixels)"
    print(f"{count} images, no errors{scope}")
