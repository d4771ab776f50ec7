"""Writing of scenes to disk, in several formats at once: data for tests, and examples of the formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image

from shunted_lit.data.digits import NAMES, load_digits
from shunted_lit.data.masks import trace_polygons
from shunted_lit.data.shapes import (
    LOOKUP_SIZE,
    SCENES,
    Scene,
    SceneOptions,
    compose_scene,
    compute_boxes,
    to_label_map,
)
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import check_new_folder

SPLITS = ("train", "val")
SUPERCATEGORIES = {"shapes": "shape", "related": "shape", "lookup": "disc", "digits": "digit"}  # of COCO files, by kind
DrawScene = Callable[[np.random.Generator, str], Scene]  # of a split

# Photographs that come with the two libraries; no photograph is in both splits.
PHOTOGRAPHS = {
    "train": ("sklearn:china.jpg", "skimage:astronaut", "skimage:coffee"),
    "val": ("sklearn:flower.jpg", "skimage:chelsea", "skimage:rocket"),
}


def write_scenes(
    out: Path,
    kind: Literal["shapes", "related", "lookup", "digits"] = "shapes",
    *,
    train: int = 1024,
    val: int = 256,
    size: int = 160,
    max_objects: int = 8,
    seed: int = 0,
) -> None:
    """Write scenes to a folder: images, YOLO labels with data.yaml, COCO annotations with masks, and label maps.

    Args:
        out: New or empty folder.
        kind: "shapes", drawn; "related" and "lookup", drawn scenes in which the class of a small object depends on a
            distant one, see `ShapesDataModule`; or "digits", real handwritten digits of 8 to 96 pixels on crops of
            photographs, where the splits share neither digits nor photographs (needs scikit-learn and scikit-image,
            extra "demo").
        train: Number of training images.
        val: Number of validation images.
        size: Height and width of an image in pixels.
        max_objects: Largest number of objects in an image.
        seed: Seed of the scenes.

    Raises:
        ValueError: The folder is not empty, or a number is too small.
    """
    check_new_folder(out)
    check_minimum(1, train=train, val=val, max_objects=max_objects)
    check_minimum(LOOKUP_SIZE if kind == "lookup" else 16, size=size)
    check_minimum(0, seed=seed)
    names, draw = digit_scenes(size, max_objects) if kind == "digits" else shape_scenes(kind, size, max_objects)
    for split, count in (("train", train), ("val", val)):
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for folder in (*(out / form / split for form in ("images", "labels", "masks")), out / "annotations"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels, masks, labels = draw(np.random.default_rng([seed, SPLITS.index(split), number]), split)
            stem = f"{number:06d}"
            Image.fromarray(pixels).save(out / "images" / split / f"{stem}.png")
            images.append({"id": number + 1, "file_name": f"{stem}.png", "width": size, "height": size})
            Image.fromarray(to_label_map(masks, labels)).save(out / "masks" / split / f"{stem}.png")
            lines = []
            for (x1, y1, x2, y2), label, mask in zip(compute_boxes(masks).int().tolist(), labels, masks, strict=True):
                fractions = ((x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size)
                lines.append(f"{label} " + " ".join(f"{value:.12g}" for value in fractions) + "\n")
                ids = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1}
                box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": int(mask.sum()), "iscrowd": 0}
                annotations.append({**ids, **box, "segmentation": trace_polygons(mask)})
            (out / "labels" / split / f"{stem}.txt").write_text("".join(lines))
        content = {
            "info": {"description": f"{kind} of shunted-lit scenes, {split}, seed {seed}", "version": "1.0"},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": [
                {"id": i + 1, "name": name, "supercategory": SUPERCATEGORIES[kind]} for i, name in enumerate(names)
            ],
        }
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))
    description = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
    (out / "data.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *names)))  # of the label maps
    print(f"{train} training and {val} validation images in {out}: {out / 'data.yaml'}, {out / 'annotations'}")


def shape_scenes(kind: str, size: int, max_objects: int) -> tuple[list[str], DrawScene]:
    """Return the class names of drawn scenes of a kind, and a function that draws one."""
    scenes = "plain" if kind == "shapes" else kind
    options = SceneOptions("masks", seed=0, size=size, min_extent=6, max_objects=max_objects, scenes=scenes)

    def draw(rng: np.random.Generator, split: str) -> Scene:
        return SCENES[scenes].compose(rng, options)

    return list(SCENES[scenes].class_names), draw


def digit_scenes(size: int, max_objects: int) -> tuple[list[str], DrawScene]:
    """Return the class names of handwritten digits, and a function that draws a scene of them on a photograph."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ValueError(
            f"Digits need scikit-learn and scikit-image ({error}): pip install 'shunted-lit[demo]'"
        ) from None
    load = {"sklearn": load_sample_image, "skimage": lambda name: getattr(skimage.data, name)()}
    photographs = {
        split: [load[library](name) for library, name in (entry.split(":") for entry in PHOTOGRAPHS[split])]
        for split in SPLITS
    }
    digits = load_digits()
    options: dict[str, Any] = {"min_extent": 8, "max_extent": min(96, size), "max_objects": max_objects}

    def draw(rng: np.random.Generator, split: str) -> Scene:
        photograph = photographs[split][rng.integers(len(photographs[split]))]
        side = int(rng.integers(min(size, *photograph.shape[:2]), min(photograph.shape[:2]) + 1))
        y, x = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
        crop = Image.fromarray(photograph[y : y + side, x : x + side]).resize((size, size))

        def draw_digit(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
            images, labels = digits[split]
            index = rng.integers(len(labels))
            digit = Image.fromarray(images[index])
            ink = digit.crop(digit.getbbox())
            scale = extent / max(ink.size)
            ink = ink.resize([max(round(side * scale), 1) for side in ink.size], Image.Resampling.BICUBIC)
            return np.asarray(ink, dtype=np.float32) / 255, int(labels[index])

        return compose_scene(rng, np.asarray(crop, dtype=np.float32).copy(), draw_object=draw_digit, **options)

    return NAMES, draw
