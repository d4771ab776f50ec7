"""Messages for faulty commands and configs: each names the value, the rule and the remedy, with exit code 2.

The cases are in bad_input.yaml. `python tests/commands/test_bad_input.py FILE` writes all messages to a JSON file.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from shunted_lit.cli import command
from shunted_lit.data.scenes import write_scenes

HERE = Path(__file__).parent
CASES = yaml.safe_load((HERE / "bad_input.yaml").read_text())
ABBREVIATIONS = {
    "FIT": "fit --model=DetectionTask --model.backbone=test_resnet --model.min_size=32 --model.max_size=32 "
    "--data=ShapesDataModule --data.size=32 --data.train_size=4 --data.val_size=2 --data.num_workers=0 "
    "--trainer.fast_dev_run=1 --trainer.accelerator=cpu",
    "YOLO": "--data=YoloDataModule --data.data=set/data.yaml --data.num_workers=0",
    "COCO": "--data=CocoDataModule --data.root=set --data.train_images=images/train --data.val_images=images/val "
    "--data.train_annotations=annotations/train.json --data.val_annotations=annotations/val.json --data.num_workers=0",
    "MASKS": "--data=MaskFolderDataModule --data.root=set --data.num_workers=0",
    "{saved}": str(HERE.parent / "saved_runs/0.1.0"),
}


def write_inputs(folder):
    """Write the data and weights that the cases use."""
    write_scenes(folder / "set", train=4, val=2, size=32)
    torch.save({"state_dict": {"a": torch.ones(1)}}, folder / "weights.pt")
    for split in ("train", "val"):
        for name in "ab":
            (folder / "set/classes" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "set/classes" / split / name / "1.png")


def prepare_files(files):
    for name, text in files.items():
        path = Path(name)
        if text == "remove":
            path.unlink()
        elif text == "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        else:
            path.write_text(text)


def run_case(case):
    """Run a case in the current folder; return its exit code, or the exception that escaped, and its output."""
    prepare_files(case.get("files", {}))
    words = case["command"]
    for short, long in ABBREVIATIONS.items():
        words = words.replace(short, long)
    output, argv = io.StringIO(), sys.argv
    sys.argv = ["shunted-lit", *shlex.split(words)]
    try:
        with contextlib.redirect_stderr(output), contextlib.redirect_stdout(output):
            command()
        return 0, output.getvalue()
    except SystemExit as stop:
        return stop.code, output.getvalue()
    except Exception as error:
        return repr(error), output.getvalue()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["command"][:60])
def test_message_names_value_rule_and_remedy(case, inputs, tmp_path):
    shutil.copytree(inputs, tmp_path, dirs_exist_ok=True)
    code, output = run_case(case)
    assert code == 2, (code, output)
    assert "Traceback" not in output
    assert "usage:" not in output
    assert output.strip().splitlines()[-1].startswith("shunted-lit: error: "), output
    for pattern in case["says"]:
        assert re.search(pattern, output), f"{pattern!r} is not in: {output}"


def test_there_are_at_least_sixty_cases():
    assert len({str(case) for case in CASES}) >= 60


if __name__ == "__main__":
    messages = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            write_inputs(Path(folder))
            code, output = run_case(case)
            messages[f"{case['command']} {case.get('files', '')}".strip()] = {"code": code, "output": output}
            os.chdir("/")
    Path(sys.argv[1]).write_text(json.dumps(messages, indent=1) + "\n")
