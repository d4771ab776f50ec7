"""Models and runs of Ultralytics that several test modules share."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import ultralytics
import yaml
from PIL import Image
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


def write_task_data(folder, task, count=4):
    """Write images of one rectangle each, with the labels of a task, and return what Ultralytics takes as `data`."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(count):
            x1, y1 = rng.integers(4, 20, 2)
            x2, y2 = rng.integers(36, 60, 2)
            image = np.full((64, 64, 3), 40, dtype=np.uint8)
            image[y1:y2, x1:x2, number % 2] = 220
            parent = f"{split}/{number % 2}" if task == "classify" else f"images/{split}"
            path = folder / parent / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            box = np.array([x1 + x2, y1 + y2, 2 * (x2 - x1), 2 * (y2 - y1)]) / 128
            corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)]) / 64
            labels = {"segment": corners, "obb": corners, "pose": [*box, *np.insert(corners, 2, 2, axis=1).flat]}
            file = folder / f"labels/{split}/{number}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(" ".join(map(str, [number % 2, *np.ravel(labels.get(task, box))])))
    content = {"train": "images/train", "val": "images/val", "names": ["red", "green"]}
    if task == "pose":
        content |= {"kpt_shape": [4, 3], "flip_idx": [1, 0, 3, 2]}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return str(folder if task == "classify" else folder / "data.yaml")


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
