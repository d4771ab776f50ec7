"""Scenes of shapes, drawn on access from a seed: data for a first run without a download."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from shunted_lit.data.base import float_image_transforms, random_color_distortion
from shunted_lit.data.detection import DetectionDataModule, Sample
from shunted_lit.utils.checks import check_choice, check_minimum

Scene = tuple[np.ndarray, np.ndarray, list[int]]  # image, masks, labels: see `compose_scene`
DrawObject = Callable[[np.random.Generator, int], tuple[np.ndarray, int]]  # from an extent to coverage and label


def regular_polygon(corners: int) -> np.ndarray:
    """Return the corners (n, 2) of a regular polygon in the unit circle, with a corner on top."""
    angles = np.arange(corners) * 2 * np.pi / corners - np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def star(points: int, inner: float) -> np.ndarray:
    return regular_polygon(2 * points) * np.where(np.arange(2 * points) % 2, inner, 1.0)[:, None]


# Outlines within the unit circle, by class.
SHAPES = {
    "circle": regular_polygon(32),
    "triangle": regular_polygon(3),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / math.sqrt(2),
    "star": star(5, 0.4),
    "cross": np.array(
        [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1), (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]
    )
    / math.sqrt(10),
}
OVERSAMPLE = 4  # factor of the drawing resolution, for smooth edges


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return soft patches of colour with some grain, (size, size, 3), float32 in 0..255."""
    coarse = (rng.uniform(70, 185) + rng.uniform(-35, 35, (4, 4, 3))).astype(np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return soft + rng.normal(0, 6, (size, size, 1)).astype(np.float32)


def draw_outline(rng: np.random.Generator, outline: np.ndarray, extent: int) -> np.ndarray:
    """Return the coverage (h, w) in 0..1 of an outline, turned by up to 15 degrees, its longer side `extent` pixels."""
    angle = rng.uniform(-np.pi / 12, np.pi / 12)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = outline @ rotation
    points = (points - points.min(axis=0)) / np.ptp(points, axis=0).max() * extent
    w, h = np.ceil(points.max(axis=0)).astype(int).clip(1)
    canvas = Image.new("L", (int(w) * OVERSAMPLE, int(h) * OVERSAMPLE))
    ImageDraw.Draw(canvas).polygon([(float(px), float(py)) for px, py in points * OVERSAMPLE], fill=255)
    return np.asarray(canvas.reduce(OVERSAMPLE), dtype=np.float32) / 255


def compose_scene(
    rng: np.random.Generator,
    image: np.ndarray,
    *,
    min_extent: float,
    max_extent: float,
    max_objects: int,
    draw_object: DrawObject,
) -> Scene:
    """Draw 1 to `max_objects` objects on an image.

    The logarithm of the extents is uniformly distributed, so that small objects are as frequent as large ones. Objects
    do not overlap: one that does not fit in 20 tries is dropped.

    Args:
        rng: Source of all random numbers.
        image: Background (size, size, 3), float32 in 0..255; changed in place.
        min_extent: Smallest extent, the longer side of an object in pixels.
        max_extent: Largest extent.
        max_objects: Largest number of objects.
        draw_object: Function that returns coverage (h, w) in 0..1 and label of an object, from generator and extent.

    Returns:
        The image, uint8; the masks (n, size, size), bool, of the visible objects; and their labels.
    """
    size = len(image)
    owner = np.full((size, size), -1, dtype=np.int16)  # the visible object at each pixel
    labels: list[int] = []
    count = int(rng.integers(1, max_objects + 1))
    for extent in sorted(np.exp(rng.uniform(np.log(min_extent), np.log(max_extent), count)), reverse=True):
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
                if np.abs(colour - around).max() < 100:  # too similar to the background
                    colour = (around + 128) % 256
                patch += alpha[..., None] * (colour - patch).astype(np.float32)
                behind[solid] = len(labels)
                labels.append(label)
                break
    masks = owner[None] == np.arange(len(labels))[:, None, None]
    return image.clip(0, 255).astype(np.uint8), masks, labels


def draw_shape(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
    """Draw one of `SHAPES`; return its coverage and label."""
    label = int(rng.integers(len(SHAPES)))
    return draw_outline(rng, list(SHAPES.values())[label], extent), label


def draw_related_shapes(size: int) -> DrawObject:
    """Return a function that draws the objects of one scene: a large shape, then discs with the class of that shape."""
    labels: list[int] = []

    def draw(rng: np.random.Generator, extent: int) -> tuple[np.ndarray, int]:
        if labels:
            return draw_outline(rng, SHAPES["circle"], min(extent, max(size // 6, 1))), labels[0]
        alpha, label = draw_shape(rng, max(extent, size // 3))
        labels.append(label)
        return alpha, label

    return draw


# For each kind of scene: a function of the image size that returns what draws the objects of one scene.
SCENES: dict[str, Callable[[int], DrawObject]] = {"plain": lambda size: draw_shape, "related": draw_related_shapes}


def compute_boxes(masks: np.ndarray) -> Tensor:
    """Return the boxes (n, 4), float32, x1 y1 x2 y2 in pixels, around masks (n, H, W)."""
    return masks_to_boxes(torch.from_numpy(masks)) + torch.tensor([0.0, 0.0, 1.0, 1.0])


def to_sample(scene: Scene, image_id: int) -> Sample:
    """Return image and target in the form of `DetectionDataModule`, with masks."""
    image, masks, labels = scene
    size = image.shape[:2]
    target = {
        "boxes": tv_tensors.BoundingBoxes(compute_boxes(masks), format="XYXY", canvas_size=size),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(len(labels), dtype=torch.int64),
        "masks": tv_tensors.Mask(masks.reshape(-1, *size)),
        "image_id": image_id,
    }
    return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), target


def to_label_map(masks: np.ndarray, labels: Sequence[int]) -> np.ndarray:
    """Return the label map (H, W), uint8, of masks (n, H, W): 0 for the background, label + 1 for an object."""
    return (masks * (np.asarray(labels, dtype=np.uint8) + 1)[:, None, None]).sum(axis=0, dtype=np.uint8)


@dataclass(frozen=True)
class SceneOptions:
    """What scenes look like; for the fields see `ShapesDataModule`."""

    annotation: str
    seed: int
    size: int
    min_extent: int
    max_objects: int
    scenes: str = "plain"


class ShapesDataset(Dataset[Any]):
    """Scenes that depend only on their index, the split and the options.

    Args:
        split: "train" or "val".
        length: Number of scenes.
        options: What the scenes look like.
        transform: Function of image and target, label map or label.
    """

    def __init__(self, split: str, length: int, options: SceneOptions, transform: Callable[..., Any]):
        self.entropy = [options.seed, ("train", "val").index(split)]
        self.length, self.options, self.transform = length, options, transform

    def __len__(self) -> int:
        return self.length

    def name_of(self, index: int) -> str:
        return f"scene {index}"

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng, options = np.random.default_rng([*self.entropy, index]), self.options
        scene = compose_scene(
            rng,
            draw_background(rng, options.size),
            min_extent=options.min_extent,
            max_extent=options.size / 2,
            max_objects=options.max_objects,
            draw_object=SCENES[options.scenes](options.size),
        )
        image, target = to_sample(scene, image_id=index)
        if options.annotation == "map":
            return self.transform(image, tv_tensors.Mask(to_label_map(*scene[1:])))
        if options.annotation == "class":
            return self.transform(image, int(target["labels"][0]))
        if options.annotation == "boxes":
            del target["masks"]
        return self.transform(image, target)


class ShapesDataModule(DetectionDataModule):
    """Circles, triangles, squares, stars and crosses, from a few pixels to half the image, for every task.

    `annotation` is "masks" or "boxes" of the objects; "map", the class of each pixel, with the background as the first
    class; or "class", the class of a single object of at least a quarter of the image. In `shunted-lit`, the task sets
    it.

    Args:
        train_size: Number of training scenes in an epoch.
        val_size: Number of validation scenes; none of them is a training scene.
        size: Height and width of an image in pixels.
        min_extent: Longer side of the smallest objects in pixels.
        max_objects: Largest number of objects in a scene.
        scenes: "plain"; or "related": one large shape, and discs with the class of that shape, which a disc alone does
            not show.
        seed: Seed of the scenes.
        flip: Probability of mirroring a training image.
        distort: Probability of changing the colours of a training image.
        options: Options of `DetectionDataModule`; `crop` applies to boxes and masks.

    Raises:
        ValueError: A size is not positive, or objects do not fit into the image.
    """

    offers = ("masks", "boxes", "map", "class")

    def __init__(
        self,
        *,
        train_size: PositiveInt = 2048,
        val_size: PositiveInt = 256,
        size: int = 128,
        min_extent: int = 6,
        max_objects: PositiveInt = 8,
        scenes: str = "plain",
        seed: NonNegativeInt = 0,
        flip: ClosedUnitInterval = 0.5,
        distort: ClosedUnitInterval = 0.0,
        **options: Any,
    ):
        super().__init__(flip=flip, distort=distort, **options)
        check_minimum(1, train_size=train_size, val_size=val_size, max_objects=max_objects)
        check_minimum(0, seed=seed)
        check_choice("scenes", scenes, SCENES)
        if not 1 <= min_extent <= size // 2:
            raise ValueError(f"`min_extent` must be 1 to {size // 2}, half of `size`, got {min_extent}.")
        self.lengths = {"train": train_size, "val": val_size}
        self.class_names = ["background", *SHAPES] if self.annotation == "map" else list(SHAPES)
        if self.annotation in ("map", "class"):
            last = float_image_transforms() if self.annotation == "map" else [v2.ToPureTensor()]
            self.train_transform = v2.Compose([random_color_distortion(distort), v2.RandomHorizontalFlip(flip), *last])
            self.eval_transform = v2.Compose(last)
            self.drop_incomplete = True
        if self.annotation == "class":
            self.collate_fn = None  # images (B, 3, size, size), uint8, and labels (B,)
            min_extent, max_objects = max(min_extent, size // 4), 1
        self.scene_options = SceneOptions(self.annotation, seed, size, min_extent, max_objects, scenes)

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return ShapesDataset(split, self.lengths[split], self.scene_options, transform)
