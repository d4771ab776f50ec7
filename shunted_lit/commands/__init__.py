"""The commands of `shunted-lit`: one table, from which its help and its dispatch follow."""

import difflib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Command:
    """A command of `shunted-lit`.

    Args:
        name: word that follows `shunted-lit`.
        group: heading in the help.
        summary: its line in the help.
        target: "module:function", imported when the command runs.
        from_signature: build the command's arguments from the signature and docstring of the function; otherwise the
            function takes the list of words that follow the name.
    """

    name: str
    group: str
    summary: str
    target: str
    from_signature: bool = False

    def load(self) -> Any:
        """Import and return the function."""
        return pkgutil.resolve_name(self.target)

    def run(self, args: Sequence[str]) -> Any:
        """Run the command with the words that follow its name and return its result."""
        if not self.from_signature:
            return self.load()(list(args))
        from jsonargparse import auto_cli

        from shunted_lit.commands.errors import CommandParser

        return auto_cli(self.load(), args=list(args), prog=f"shunted-lit {self.name}", parser_class=CommandParser)


TRAIN, PREDICT, INSPECT, DATA, YOLO = "Train and evaluate", "Predict and export", "Inspect", "Data", "YOLO"
COMMANDS = {
    command.name: command
    for command in (
        Command("fit", TRAIN, "Train a model, or resume a run.", "shunted_lit.commands.fit:fit"),
        Command("validate", TRAIN, "Evaluate a checkpoint on validation data.", "shunted_lit.commands.fit:validate"),
        Command("test", TRAIN, "Evaluate a checkpoint like validate; log its scores as test/.",
                "shunted_lit.commands.fit:test"),
        Command("study", TRAIN, "Train several configs with several seeds and compare the scores.",
                "shunted_lit.commands.study:study", True),
        Command("configs", TRAIN, "List the configs that are installed with this package, or copy one.",
                "shunted_lit.commands.configs:configs", True),
        Command("predict", PREDICT, "Predict images with a checkpoint and write pictures, labels and tables.",
                "shunted_lit.commands.fit:predict"),
        Command("export", PREDICT, "Export a network to ONNX, OpenVINO, torch.export or safetensors.",
                "shunted_lit.commands.export:export", True),
        Command("attention", INSPECT, "Draw the attention maps of a network on an image.",
                "shunted_lit.commands.attention:attention", True),
        Command("cost", INSPECT, "Count tokens, keys and FLOPs of attention at each granularity.",
                "shunted_lit.commands.cost:cost", True),
        Command("benchmark", INSPECT, "Measure speed and memory of necks and backbones.",
                "shunted_lit.commands.benchmark:benchmark", True),
        Command("check", DATA, "Print every error in a data set.", "shunted_lit.commands.check:check"),
        Command("shard", DATA, "Write a data set as shards (tar files in WebDataset's format).",
                "shunted_lit.commands.shard:shard"),
        Command("scenes", DATA, "Write a synthetic data set of drawn objects in COCO's, YOLO's and mask formats.",
                "shunted_lit.data.scenes:write_scenes", True),
        Command("digits", DATA, "Write the handwritten digits of scikit-learn as folders of images.",
                "shunted_lit.data.digits:write_digits", True),
        Command("yolo", YOLO, "Add the neck to an Ultralytics model, and run Ultralytics' own commands on it.",
                "shunted_lit.commands.yolo:yolo"),
    )
}  # fmt: skip


def find_command(name: str) -> Command:
    """Return a command by name.

    Raises:
        ValueError: there is no such command; names similar ones.
    """
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=2)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"there is no command {name!r}; {hint}`shunted-lit --help` lists all commands.")
    return COMMANDS[name]


def format_help() -> str:
    """Return the list of all commands, by group."""
    description = "Shunted Transformer (CVPR 2022): train, evaluate, inspect and export its neck and backbones."
    lines = ["usage: shunted-lit COMMAND [arguments]", "", description]
    for group, commands in groupby(COMMANDS.values(), lambda command: command.group):
        lines += ["", f"{group}:", *(f"  {command.name:10} {command.summary}" for command in commands)]
    return "\n".join([*lines, "", "`shunted-lit COMMAND --help` describes a command and its arguments."])
