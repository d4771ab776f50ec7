"""`shunted-lit yolo`: Ultralytics models with the neck."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shunted_lit.commands.errors import CommandParser
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import check_new_file

HELP = """usage: shunted-lit yolo yaml --base BASE --out FILE      write a model YAML that contains the neck
       shunted-lit yolo weights --model FILE --out FILE  write a checkpoint of it, with the weights of its base model
       shunted-lit yolo score --model FILE --data FILE   print average precision by the size of objects
       shunted-lit yolo train|val|predict|export ...     run a command of Ultralytics, with the neck registered

`yaml`, `weights` and `score` describe their arguments with --help. All need Ultralytics (AGPL-3.0):
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

    commands: dict[str, Callable[..., Any]] = {
        "yaml": adapter.write_yaml,
        "weights": adapter.write_weights,
        "score": score,
    }
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


def score(model: str | Path, data: str | Path, *, split: Literal["train", "val", "test"] = "val", imgsz: int = 640,
          out: Path | None = None) -> None:  # fmt: skip
    """Print COCO's average precision of a YOLO: of all objects, by their size, and by class.

    Tiny is below 16 x 16 pixels, small below 32 x 32 (with the tiny ones), large from 96 x 96. Up to 1,000 detections
    per image count.

    Args:
        model: Checkpoint of Ultralytics, with or without the neck.
        data: data.yaml of the data set.
        split: The split to predict, an entry of data.yaml.
        imgsz: Size that images are scaled to, as in Ultralytics.
        out: File to write the scores to, as JSON.

    Raises:
        ValueError: The data are damaged or lack the split, the model cannot be read or has other classes, or the file
            exists.
    """
    from shunted_lit.prediction.yolo_scores import compute_scores
    from shunted_lit.ultralytics import load_model

    check_minimum(32, imgsz=imgsz)
    if out is not None:
        check_new_file(out, ".json")
    scores = compute_scores(load_model(model), data, split, imgsz)
    table = Table(title=f"{Path(model).name}, {split}", box=SIMPLE_HEAD)
    table.add_column("")
    table.add_column("", justify="right")
    for name, value in scores.items():
        table.add_row(name, "no such object" if value is None else f"{value:.4f}")
    Console().print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(scores, indent=1), encoding="utf-8")
