"""Scenes of drawn shapes, made on the fly from a seed: data for a first run, with nothing to download."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from shunted_lit.data.base import DetectionDataModule, Sample, float_image_transforms, random_color_distortion


def regular(corners: int) -> np.ndarray:
    """Corners (n, 2) of a regular polygon in the unit circle, the first one on top."""
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def star(points: int, inner: float) -> np.ndarray:
    return regular(2 * points) * np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]


# Outlines within the unit circle, by class.
SHAPES = {
    "circle": regular(32),
    "triangle": regular(3),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / math.sqrt(2),
    "star": star(5, 0.4),
    "cross": np.array(
        [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
    )
    / math.sqrt(10),
}
OVERSAMPLE = 4  # pixels drawn for one, so that edges are smooth


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Soft patches of colour and some grain, (size, size, 3), float32 in 0..255."""
    coarse = (rng.uniform(70, 185) + rng.uniform(-35, 35, (4, 4, 3))).astype(np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return soft + rng.normal(0, 6, (size, size, 1)).astype(np.float32)


def outline_alpha(rng: np.random.Generator, outline: np.ndarray, extent: int) -> np.ndarray:
    """Coverage (h, w) in 0..1 of the outline, turned by up to 15 degrees, its longer side `extent` pixels."""
    angle = rng.uniform(-np.pi / 12, np.pi / 12)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = outline @ turn
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0).max() * extent
    w, h = np.ceil(points.max(axis=0)).astype(int).clip(1)
    canvas = Image.new("L", (int(w) * OVERSAMPLE, int(h) * OVERSAMPLE))
    ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in points * OVERSAMPLE], fill=255)
    return np.asarray(canvas.reduce(OVERSAMPLE), dtype=np.float32) / 255


def compose(
    rng: np.random.Generator,
    image: np.ndarray,
    min_extent: float,
    max_extent: float,
    max_objects: int,
    draw_object: Callable[[np.random.Generator, int], tuple[np.ndarray, int]],
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Puts 1 to `max_objects` objects on `image` (size, size, 3), a float32 background in 0..255.

    Extents are drawn evenly on a logarithmic scale, so that small objects are as frequent as large ones. No object
    covers another: one that finds no free place in 20 tries is left out.

    Args:
        draw_object: from an extent in pixels to coverage (h, w) in 0..1 and a label.

    Returns:
        The image, uint8; masks (n, size, size), bool, of what is seen of each object; labels.
    """
    size = len(image)
    owner = np.full((size, size), -1, dtype=np.int16)  # which object is seen
    labels: list[int] = []
    wanted = int(rng.integers(1, max_objects + 1))
    for extent in sorted(np.exp(rng.uniform(np.log(min_extent), np.log(max_extent), wanted)), reverse=True):
        alpha, label = draw_object(rng, max(round(extent), 1))
        h, w = alpha.shape
        solid = alpha > 0.5
        if h > size or w > size or not solid.any():
            continue
        for _ in range(20):
            x, y = int(rng.integers(size - w + 1)), int(rng.integers(size - h + 1))
            patch, behind = image[y : y + h, x : x + w], owner[y : y + h, x : x + w]
            if (behind[solid] < 0).all():
                around = patch.mean(axis=(0, 1))
                colour = rng.uniform(0, 255, 3)
                if np.abs(colour - around).max() < 100:  # too much like what lies behind it
                    colour = (around + 128) % 256
                patch += alpha[..., None] * (colour - patch).astype(np.float32)
                behind[solid] = len(labels)
                labels.append(label)
                break
    masks = owner[None] == np.arange(len(labels))[:, None, None]
    return image.clip(0, 255).astype(np.uint8), masks, labels


def draw_shape(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
    """Coverage and label of one of `SHAPES`, turned at random."""
    label = int(rng.integers(len(SHAPES)))
    return outline_alpha(rng, list(SHAPES.values())[label], extent), label


def related_shapes(size: int) -> Callable[[np.random.Generator, int], tuple[np.ndarray, int]]:
    """For one scene: a large shape first, then discs, alike in every scene, whose class is that of the large shape."""
    key: list[int] = []

    def draw(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
        if not key:
            alpha, label = draw_shape(rng, max(extent, size // 3))
            key.append(label)
            return alpha, label
        return outline_alpha(rng, SHAPES["circle"], min(extent, max(size // 6, 1))), key[0]

    return draw


# What draws the objects of a scene, by name; made anew for each.
SCENES: dict[str, Callable[[int], Callable[[np.random.Generator, int], tuple[np.ndarray, int]]]] = {
    "plain": lambda size: draw_shape,
    "related": related_shapes,
}


def boxes_of(masks: np.ndarray) -> list[tuple[int, int, int, int]]:
    """x1 y1 x2 y2 around each of the masks (n, H, W)."""
    boxes = []
    for mask in masks:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    return boxes


def to_sample(image: np.ndarray, masks: np.ndarray, labels: Sequence[int], image_id: int) -> Sample:
    """An image and a target in the form of `DetectionDataModule`, with `masks` (n, H, W) besides."""
    size = image.shape[:2]
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes_of(masks), dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size
        ),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        "masks": tv_tensors.Mask(masks.reshape(-1, *size)),
        "image_id": image_id,
    }
    return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target


def to_map(image: np.ndarray, masks: np.ndarray, labels: Sequence[int]) -> tuple[Tensor, Tensor]:
    """An image and its label map (H, W), uint8: 0 for the background, label + 1 where an object is seen."""
    label_map = (masks * (np.asarray(labels, dtype=np.uint8) + 1)[:, None, None]).sum(axis=0, dtype=np.uint8)
    return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(label_map)


class ShapesDataset(Dataset[Any]):
    """`length` scenes; scene i of a split and seed is always the same. For the arguments see `ShapesDataModule`."""

    def __init__(self, split: str, length: int, seed: int, size: int, min_extent: int, max_objects: int,
                 annotation: str, transform: Callable[..., Any], scenes: str = "plain"):  # fmt: skip
        self.scenes = SCENES[scenes]
        self.entropy = [seed, ("train", "val").index(split)]
        self.length, self.size, self.min_extent, self.max_objects = length, size, min_extent, max_objects
        self.annotation, self.transform = annotation, transform

    def __len__(self) -> int:
        return self.length

    def name_of(self, index: int) -> str:
        return f"scene {index}"

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = np.random.default_rng([*self.entropy, index])
        draw = self.scenes(self.size)
        scene = compose(rng, background(rng, self.size), self.min_extent, self.size / 2, self.max_objects, draw)
        if self.annotation == "map":
            return self.transform(*to_map(*scene))
        image, target = to_sample(*scene, image_id=index)
        if self.annotation == "class":
            return self.transform(image, int(target["labels"][0]))
        if self.annotation == "boxes":
            del target["masks"]
        return self.transform(image, target)


class ShapesDataModule(DetectionDataModule):
    """Circles, triangles, squares, stars and crosses, from a few pixels to half the image, for every task.

    Args:
        train_size, val_size: scenes an epoch; train and val never share one.
        size: height and width in pixels.
        min_extent: longer side of the smallest objects, in pixels.
        max_objects: objects a scene, at most.
        scenes: "plain", or "related": one large shape, and discs whose class is that of the large shape, so that what
            a small object is can't be seen from itself.
        seed: other seed, other scenes.
        batch_size, num_workers, flip, distort: as in `DetectionDataModule`.
        crop: as there; for boxes and masks.
        annotation: "masks" or "boxes" of the objects; "map", the class of each pixel, where the background is a class,
            the first; "class", one object of a quarter of the image or more, and its class. From the task, in
            `shunted-lit`.

    Raises:
        ValueError: a size that is not positive, or objects that do not fit.
    """

    offers = ("masks", "boxes", "map", "class")

    def __init__(
        self,
        train_size: int = 2048,
        val_size: int = 256,
        size: int = 128,
        min_extent: int = 6,
        max_objects: int = 8,
        scenes: str = "plain",
        seed: int = 0,
        batch_size: int = 16,
        num_workers: int = 2,
        flip: float = 0.5,
        distort: float = 0.0,
        crop: float = 0.0,
        annotation: str | None = None,
    ):
        super().__init__(batch_size, num_workers, flip, distort, crop, annotation)
        self.save_hyperparameters(logger=False)
        for name, value in {"train_size": train_size, "val_size": val_size, "max_objects": max_objects}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but at least 1 is needed")
        if scenes not in SCENES:
            raise ValueError(f"scenes are {scenes!r}; choose one of {', '.join(sorted(SCENES))}")
        if seed < 0:
            raise ValueError(f"seed is {seed}, but at least 0 is needed")
        if not 1 <= min_extent <= size // 2:
            raise ValueError(f"min_extent is {min_extent}, but 1 to half the size, {size // 2}, is possible")
        self.class_names = list(SHAPES)
        self.lengths = {"train": train_size, "val": val_size}
        if self.annotation in ("map", "class"):
            last = float_image_transforms() if self.annotation == "map" else [v2.ToPureTensor()]
            self.train_transform = v2.Compose([random_color_distortion(distort), v2.RandomHorizontalFlip(flip), *last])
            self.eval_transform = v2.Compose(last)
            self.whole_batches = True
        if self.annotation == "map":
            self.class_names = ["background", *SHAPES]
        if self.annotation == "class":
            self.collate_fn = None  # images (B, 3, size, size), uint8, and labels (B,)
            min_extent, max_objects = max(min_extent, size // 4), 1
        self.scene = (seed, size, min_extent, max_objects, self.annotation)
        self.scenes = scenes

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return ShapesDataset(split, self.lengths[split], *self.scene, transform=transform, scenes=self.scenes)
