"""Reading of the scenes in tests/data/conftest.py, and comparison of samples."""

import json

import torch

from shunted_lit.data import CocoDataModule, YoloDataModule

STILL = {"num_workers": 0, "flip": 0.0, "distort": 0.0, "crop": 0.0}  # no augmentation


def read_yolo(folder, **options):
    module = YoloDataModule(str(folder / "data.yaml"), **{**STILL, **options})
    module.setup("fit")
    return module


def coco_files(train="train", val="val"):
    """Return the options that name the files of a split of the scenes."""
    files = {"train": train, "val": val}
    return {f"{split}_images": f"images/{name}" for split, name in files.items()} | {
        f"{split}_annotations": f"annotations/{name}.json" for split, name in files.items()
    }


def read_coco(folder, **options):
    module = CocoDataModule(str(folder), **{**STILL, **coco_files(), **options})
    module.setup("fit")
    return module


def edit_annotations(folder, change):
    """Apply a function to the content of the training annotations."""
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def same_sample(a, b):
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in ("boxes", "labels"))


def same_masks(a, b):
    return same_sample(a, b) and torch.equal(a[1]["masks"], b[1]["masks"])
