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
                paint(patch, behind, alpha, colour, len(labels))
                labels.append(label)
                break
    masks = owner[None] == np.arange(len(labels))[:, None, None]
    return image.clip(0, 255).astype(np.uint8), masks, labels


def paint(patch: np.ndarray, owner: np.ndarray, alpha: np.ndarray, colour: np.ndarray, value: int) -> None:
    """Blend a colour into a patch of an image by its coverage, and write `value` to the owner of covered pixels."""
    patch += alpha[..., None] * (colour - patch).astype(np.float32)
    owner[alpha > 0.5] = value


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


def compose_shapes(rng: np.random.Generator, options: "SceneOptions", draw_object: DrawObject = draw_shape) -> Scene:
    return compose_scene(
        rng,
        draw_background(rng, options.size),
        min_extent=options.min_extent,
        max_extent=options.size / 2,
        max_objects=options.max_objects,
        draw_object=draw_object,
    )


def compose_related_scene(rng: np.random.Generator, options: "SceneOptions") -> Scene:
    return compose_shapes(rng, options, draw_related_shapes(options.size))


CUE_COLOURS = np.array([(225, 45, 45), (45, 190, 60), (50, 80, 230), (235, 205, 45)], dtype=np.float32)
CUES = 3  # rings in a scene, each in a colour of its own
LOOKUP_SIZE = 128  # smallest image in which the bar of a ring is 2 pixels thick


def draw_ring(extent: int, vertical: bool) -> np.ndarray:
    """Return the coverage (extent, extent) in 0..1 of a ring with a horizontal or vertical bar through its centre."""
    side = extent * OVERSAMPLE
    canvas = Image.new("L", (side, side))
    draw, line = ImageDraw.Draw(canvas), side // 8
    draw.ellipse((0, 0, side - 1, side - 1), outline=255, width=line)
    draw.rectangle((0, (side - line) // 2, side - 1, (side + line) // 2), fill=255)
    alpha = np.asarray(canvas.reduce(OVERSAMPLE), dtype=np.float32) / 255
    return alpha.T.copy() if vertical else alpha


def compose_lookup_scene(rng: np.random.Generator, options: "SceneOptions") -> Scene:
    """Draw three rings, each of another colour and with its own bar, and discs in these colours.

    The class of a disc is the direction of the bar in the ring of its colour, which is at least a third of the image
    away: each disc has to look up another place by content. The rings themselves are no objects. All sizes are
    fractions of the image: in an image of 256 pixels, a ring has 17, and a disc 11 to 17.

    Returns:
        As `compose_scene`.
    """
    size = options.size
    image = draw_background(rng, size)
    owner = np.full((size, size), -1, dtype=np.int16)  # the visible object at each pixel; -2 for a ring

    def place(alpha: np.ndarray, colour: np.ndarray, value: int, away_from: np.ndarray | None) -> np.ndarray | None:
        """Draw at a free place, at a distance from a centre; return the centre, or None where 50 tries find none."""
        side = len(alpha)
        for _ in range(50):
            corner = rng.integers(0, size - side + 1, 2)
            centre, (y, x) = corner + side / 2, corner
            if away_from is not None and np.hypot(*(centre - away_from)) < size / 3:
                continue
            patch, behind = image[y : y + side, x : x + side], owner[y : y + side, x : x + side]
            if (behind == -1).all():
                paint(patch, behind, alpha, colour, value)
                return centre
        return None

    colours = CUE_COLOURS[rng.permutation(len(CUE_COLOURS))[:CUES]]
    bars = rng.integers(0, 2, CUES)
    rings = [
        place(draw_ring(round(size / 15), bool(bar)), colour, -2, None)
        for bar, colour in zip(bars, colours, strict=True)
    ]
    labels: list[int] = []
    for _ in range(int(rng.integers(1, options.max_objects + 1))):
        cue = int(rng.integers(CUES))
        disc = draw_outline(rng, SHAPES["circle"], round(size * rng.uniform(11, 17) / 256))
        square = np.zeros((max(disc.shape),) * 2, dtype=np.float32)
        square[: disc.shape[0], : disc.shape[1]] = disc
        if rings[cue] is not None and place(square, colours[cue], len(labels), rings[cue]) is not None:
            labels.append(int(bars[cue]))
    masks = owner[None] == np.arange(len(labels))[:, None, None]
    return image.clip(0, 255).astype(np.uint8), masks, labels


@dataclass(frozen=True)
class SceneKind:
    """Names of the classes, and the function that draws a scene."""

    class_names: Sequence[str]
    compose: Callable[[np.random.Generator, "SceneOptions"], Scene]


SCENES = {
    "plain": SceneKind(list(SHAPES), compose_shapes),
    "related": SceneKind(list(SHAPES), compose_related_scene),
    "lookup": SceneKind(["horizontal", "vertical"], compose_lookup_scene),
}


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
        options = self.options
        scene = SCENES[options.scenes].compose(np.random.default_rng([*self.entropy, index]), options)
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
        min_extent: Longer side of the smallest objects in pixels, in plain and related scenes.
        max_objects: Largest number of objects in a scene.
        scenes: "plain"; "related": one large shape, and discs with the class of that shape, which a disc alone does
            not show; or "lookup": the class of a disc, "horizontal" or "vertical", is the bar in the distant ring of
            its colour, one of three rings.
        seed: Seed of the scenes.
        flip: Probability of mirroring a training image.
        distort: Probability of changing the colours of a training image.
        options: Options of `DetectionDataModule`; `crop` applies to boxes and masks.

    Raises:
        ValueError: A size is not positive, objects do not fit into the image, or lookup scenes are to have one class.
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
        if scenes == "lookup":
            check_minimum(LOOKUP_SIZE, size=size)
            if self.annotation == "class":
                raise ValueError("`scenes` must be plain or related for classification, got 'lookup'.")
        self.lengths = {"train": train_size, "val": val_size}
        self.class_names = ["background"] * (self.annotation == "map") + list(SCENES[scenes].class_names)
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
