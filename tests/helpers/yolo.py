"""Models and runs of Ultralytics that several test modules share."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import ultralytics
from ultralytics import YOLO
from ultralytics.nn import tasks

import shunted_lit.ultralytics as adapter

INSTALLED = {file.stem for file in Path(ultralytics.__file__).parent.rglob("*.yaml")}
FAMILIES = [family for family in ("yolo26", "yolo11") if family in INSTALLED]
NANO = f"{FAMILIES[0]}n"
SMALL = {"depth": 1, "mlp_ratios": 1}  # keywords of a small neck
HAS_RESTRICTED_LOADING = hasattr(tasks, "_SafeLoad")  # false for the oldest supported version


def predict(model, x):
    with torch.no_grad():
        return model.eval()(x)[0]


def has_neck(path, layer=11):
    return isinstance(YOLO(path).model.model[layer], adapter.ShuntedTransformer)


def run_python(*args, status=0, **environment):
    """Run Python in a new process, check its exit status, and return its output."""
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def run_yolo(path, call, imports=""):
    """Call a method of Ultralytics' YOLO in a new process, print its result, and return the output."""
    return run_python("-c", f"{imports}\nfrom ultralytics import YOLO\nprint('result:', YOLO({str(path)!r}).{call})")
