"""`shunted-lit yolo`: Ultralytics models with the neck."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import auto_cli

from shunted_lit.commands.errors import CommandParser

HELP = """usage: shunted-lit yolo yaml --base BASE --out FILE      write a model YAML that contains the neck
       shunted-lit yolo weights --model FILE --out FILE  write a checkpoint of it, with the weights of its base model
       shunted-lit yolo train|val|predict|export ...     run a command of Ultralytics, with the neck registered

`yaml` and `weights` describe their arguments with --help. All need Ultralytics (AGPL-3.0):
pip install 'shunted-lit[ultralytics]'"""


def yolo(args: Sequence[str]) -> Any:
    """Run `shunted-lit yolo`.

    Args:
        args: words after `shunted-lit yolo`.

    Raises:
        ValueError: Ultralytics is missing or too old, or does not accept the words.
    """
    if not args or args[0] in ("-h", "--help", "help"):
        print(HELP)
        return None
    try:
        from shunted_lit import ultralytics as adapter
    except ImportError as error:
        raise ValueError(str(error)) from error
    from ultralytics import cfg

    commands: dict[str, Callable[..., Any]] = {"yaml": adapter.write_yaml, "weights": adapter.write_weights}
    if args[0] in commands:
        prog = f"shunted-lit yolo {args[0]}"
        return auto_cli(
            commands[args[0]], args=list(args[1:]), prog=prog, as_positional=False, parser_class=CommandParser
        )
    cfg.ARGV = ["yolo", *args]  # the words that Ultralytics' entry point parses
    try:
        return cfg.entrypoint()
    except SyntaxError as error:  # raised for words that Ultralytics does not know
        message = re.sub(r"\x1b\[[\d;]*m", "", str(error)).strip()  # without colours
        reason = message.splitlines()[0]  # older versions add their whole help
        raise ValueError(f"{reason} See `shunted-lit yolo --help`.") from None
