"""Scenes written to disk, in several formats side by side: data for tests, and a pattern for one's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image

from shunted_lit.data.digits import NAMES, load_digits
from shunted_lit.data.masks import encode_run_lengths
from shunted_lit.data.shapes import SHAPES, background, boxes_of, compose, draw_shape, to_map
from shunted_lit.utils.files import check_new_folder

SPLITS = ("train", "val")
Scene = tuple[np.ndarray, np.ndarray, list[int]]  # image, masks, labels: what `compose` returns
Draw = Callable[[np.random.Generator, str], Scene]  # a scene of a split

# Photographs that come with the two libraries, apart for train and val.
PHOTOGRAPHS = {
    "train": ("sklearn:china.jpg", "skimage:astronaut", "skimage:coffee"),
    "val": ("sklearn:flower.jpg", "skimage:chelsea", "skimage:rocket"),
}


def write_scenes(
    out: Path,
    kind: Literal["shapes", "digits"] = "shapes",
    train: int = 1024,
    val: int = 256,
    size: int = 160,
    max_objects: int = 8,
    seed: int = 0,
) -> None:
    """Write scenes to a new folder: images; data.yaml with labels for YOLO; annotations and masks for COCO; label maps.

    Args:
        out: folder to write; must not exist, or be empty.
        kind: "shapes", drawn; "digits", real handwritten digits of 8 to 96 pixels on crops of photographs, where
            train and val share neither digit nor photograph (needs scikit-learn and scikit-image, extra "demo").
        train: number of training images.
        val: number of validation images.
        size: height and width in pixels.
        max_objects: objects an image, at most.
        seed: other seed, other scenes.

    Raises:
        ValueError: a folder that is not empty, a number that is not positive.
    """
    check_new_folder(out)
    least = {
        "train": (train, 1),
        "val": (val, 1),
        "size": (size, 16),
        "max_objects": (max_objects, 1),
        "seed": (seed, 0),
    }
    for name, (value, bound) in least.items():
        if value < bound:
            raise ValueError(f"{name} is {value}, but at least {bound} is needed")
    names, draw = {"shapes": shape_scenes, "digits": digit_scenes}[kind](size, max_objects)
    for split, count in (("train", train), ("val", val)):
        images: list[dict] = []
        annotations: list[dict] = []
        for folder in (*(out / kind / split for kind in ("images", "labels", "masks")), out / "annotations"):
            folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels, masks, labels = draw(np.random.default_rng([seed, SPLITS.index(split), number]), split)
            stem = f"{number:06d}"
            Image.fromarray(pixels).save(out / "images" / split / f"{stem}.png")
            images.append({"id": number + 1, "file_name": f"{stem}.png", "width": size, "height": size})
            label_map = to_map(pixels, masks, labels)[1].numpy()
            Image.fromarray(label_map).save(out / "masks" / split / f"{stem}.png")
            lines = []
            for (x1, y1, x2, y2), label, mask in zip(boxes_of(masks), labels, masks, strict=True):
                fractions = ((x1 + x2) / 2 / size, (y1 + y2) / 2 / size, (x2 - x1) / size, (y2 - y1) / size)
                lines.append(f"{label} " + " ".join(f"{value:.12g}" for value in fractions) + "\n")
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": int(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": encode_run_lengths(mask),
                    }
                )
            (out / "labels" / split / f"{stem}.txt").write_text("".join(lines))
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / "annotations" / f"{split}.json").write_text(json.dumps(content))
    description = {"train": "images/train", "val": "images/val", "names": dict(enumerate(names))}
    (out / "data.yaml").write_text(yaml.safe_dump(description, sort_keys=False))
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in ("background", *names)))  # of the label maps
    print(f"{train} training and {val} validation images in {out}: {out / 'data.yaml'}, {out / 'annotations'}")


def shape_scenes(size: int, max_objects: int) -> tuple[list[str], Draw]:
    """Class names and scenes of drawn shapes."""

    def draw(rng: np.random.Generator, split: str) -> Scene:
        return compose(rng, background(rng, size), 6, size / 2, max_objects, draw_shape)

    return list(SHAPES), draw


def digit_scenes(size: int, max_objects: int) -> tuple[list[str], Draw]:
    """Class names and scenes of scikit-learn's 1,797 handwritten digits on photographs."""
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError as error:
        raise ValueError(
            f"digits need scikit-learn and scikit-image ({error}): pip install 'shunted-lit[demo]'"
        ) from None
    load = {"sklearn": load_sample_image, "skimage": lambda name: getattr(skimage.data, name)()}
    photographs = {
        split: [load[library](name) for library, name in (entry.split(":") for entry in PHOTOGRAPHS[split])]
        for split in SPLITS
    }
    digits = load_digits()

    def draw(rng: np.random.Generator, split: str) -> Scene:
        photograph = photographs[split][rng.integers(len(photographs[split]))]
        side = int(rng.integers(min(size, *photograph.shape[:2]), min(photograph.shape[:2]) + 1))
        y, x = (int(rng.integers(length - side + 1)) for length in photograph.shape[:2])
        crop = Image.fromarray(photograph[y : y + side, x : x + side]).resize((size, size))

        def draw_digit(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
            images, labels = digits[split]
            index = rng.integers(len(labels))
            strokes = Image.fromarray(images[index])
            ink = strokes.crop(strokes.getbbox())
            scale = extent / max(ink.size)
            ink = ink.resize([max(round(side * scale), 1) for side in ink.size], Image.Resampling.BICUBIC)
            return np.asarray(ink, dtype=np.float32) / 255, int(labels[index])

        return compose(rng, np.asarray(crop, dtype=np.float32).copy(), 8, min(96, size), max_objects, draw_digit)

    return NAMES, draw
