"""Base of the detection data: images with boxes, and masks where a task needs them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_area
from torchvision.transforms import v2

from shunted_lit.data.base import BaseDataModule, collate, float_image_transforms, random_color_distortion
from shunted_lit.data.image_io import IMAGE_ENDINGS, DamagedError, read_image, read_size
from shunted_lit.data.masks import Segment, draw_mask
from shunted_lit.utils.checks import check_fraction
from shunted_lit.utils.slices import Slices, Window

log = logging.getLogger(__name__)

Box = tuple[float, float, float, float]  # x1 y1 x2 y2
Sample = tuple[Tensor, dict[str, Any]]


class DetectionDataModule(BaseDataModule):
    """Base of the detection data modules.

    A sample is an image (3, H, W), float32 in 0..1, and a target: `boxes` (n, 4), float32, as x1 y1 x2 y2 in pixels;
    `labels` (n,) from 0; `iscrowd` (n,), 1 for regions that evaluation ignores; `image_id`; and where they are needed
    `masks` (n, H, W), bool. A batch is two lists.

    Args:
        flip: Probability of mirroring a training image.
        distort: Probability of changing the colours of a training image.
        crop: Probability of cropping a training image to a region that keeps some objects.
        slices: Side of the windows, in pixels, into which images are cut; null for whole images. Each window is a
            training image of its own; in evaluation, the predictions of the windows are joined.
        overlap: Least overlap of neighbouring windows, as a fraction of their side.
        annotation: "boxes" or "masks"; set by the task in `shunted-lit`.
        options: Options of `BaseDataModule`.
    """

    collate_fn: Callable[[list[Any]], Any] | None = staticmethod(collate)
    offers: tuple[str, ...] = ("boxes", "masks")

    def __init__(
        self,
        *,
        flip: ClosedUnitInterval = 0.5,
        distort: ClosedUnitInterval = 0.5,
        crop: ClosedUnitInterval = 0.0,
        slices: int | None = None,
        overlap: float = 0.2,
        annotation: str | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.slicing = None if slices is None else Slices(slices, overlap)
        check_fraction(flip=flip, distort=distort, crop=crop)
        self.choose_annotation(annotation)
        self.train_transform = v2.Compose(
            [
                random_color_distortion(distort),
                v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5)], crop),
                v2.RandomHorizontalFlip(flip),
                v2.SanitizeBoundingBoxes(labels_getter=get_box_attributes),
                *float_image_transforms(),
            ]
        )
        self.eval_transform = v2.Compose(float_image_transforms())

    def dataset(self, split: str) -> Any:
        dataset = super().dataset(split)
        if split == "train" and self.slicing is not None and not isinstance(dataset, SlicedDataset):
            if not isinstance(dataset, FolderDataset):
                raise ValueError(f"`slices` must be null for {type(self).__name__}: only image files are cut.")
            self.datasets[split] = dataset = SlicedDataset(dataset, self.slicing)
        return dataset


def get_box_attributes(sample: Any) -> list[Tensor]:
    """Return the tensors that lose an entry, as masks do, with each box that augmentation removes."""
    return [sample[1]["labels"], sample[1]["iscrowd"]]


@dataclass
class Record:
    """An image on disk and its objects, as read from label files."""

    path: Path
    image_id: int
    boxes: list[Box] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    size: tuple[int, int] | None = None  # width and height, where the annotations state them
    crowd: list[bool] = field(default_factory=list)  # regions that evaluation ignores; empty for none
    segments: list[Segment] | None = None  # outline of each object; None where masks are not needed
    content: bytes | None = None  # content of the image file, where it is not on disk


class FolderDataset(Dataset[Sample]):
    """Images on disk, read on access.

    Args:
        records: Images and their objects.
        relative: Whether boxes and polygons are in fractions of the image instead of pixels.
        transform: Function of image and target.
        source: Name of the data set in messages.

    Raises:
        ValueError: There is no image, or none with an object.
        DamagedError: On access: an image is missing, cannot be read, or has another size than its annotations state;
            or a box has no area.
    """

    def __init__(self, records: list[Record], *, relative: bool, transform: Callable[..., Sample], source: Path | str):
        if not records:
            raise ValueError(f"{source}: no images found; their names must end in {IMAGE_ENDINGS}.")
        background = sum(not record.labels for record in records)
        if background == len(records):
            raise ValueError(f"{source}: none of the {background} images has an object; check where the labels are.")
        if background:
            log.warning("%s: %d of %d images have no object", source, background, len(records))
        self.records, self.relative, self.transform = records, relative, transform

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return self.transform(*self.read(index))

    def count_objects(self) -> int:
        return sum(len(record.labels) for record in self.records)

    def name_of(self, index: int) -> str:
        return str(self.records[index].path)

    def boxes_in_pixels(self, record: Record, width: int, height: int) -> Tensor:
        """Return the boxes (n, 4) of an image of this size. Raise DamagedError where they do not fit it."""
        if record.size not in (None, (width, height)):
            raise DamagedError(f"{record.path}: is {width} x {height}, but its annotations state {record.size}.")
        boxes = torch.tensor(record.boxes, dtype=torch.float64).reshape(-1, 4)
        if self.relative:
            boxes *= torch.tensor([width, height, width, height])
        boxes = boxes.round(decimals=4)  # so that fractions and pixels give equal boxes
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise DamagedError(
                f"{record.path}: a box has no area in this image of {width} x {height}: {boxes.tolist()}."
            )
        return boxes.float()

    def size_of(self, index: int) -> tuple[int, int]:
        """Return width and height of an image, from its annotations or its header."""
        record = self.records[index]
        return record.size or read_size(record.path)

    def check_header(self, index: int) -> None:
        """Raise DamagedError where the image's header cannot be read, or the boxes do not fit its size."""
        record = self.records[index]
        size = read_size(record.path)
        if record.size in (None, size):
            self.boxes_in_pixels(record, *size)
        else:
            self.read(index)  # a header may lack the orientation

    def load_record(self, index: int) -> Record:
        return self.records[index]

    def read(self, index: int) -> Sample:
        """Return image and target before `transform`."""
        record = self.load_record(index)
        image = tv_tensors.Image(read_image(record.path, record.content))
        height, width = image.shape[-2:]
        boxes = self.boxes_in_pixels(record, width, height)
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(record.labels, dtype=torch.int64),
            "iscrowd": torch.tensor(record.crowd or [False] * len(record.labels), dtype=torch.int64),
            "image_id": record.image_id,
        }
        if record.segments is not None:
            scale = (width, height) if self.relative else (1, 1)
            masks = [draw_mask(segment, height, width, scale) for segment in record.segments]
            target["masks"] = tv_tensors.Mask(np.stack(masks) if masks else np.zeros((0, height, width), dtype=bool))
        return image, target


class SlicedDataset(Dataset[Sample]):
    """Windows of the images of a data set, as samples of their own.

    An object belongs to a window that shows at least 30 % of its box, and is clipped to it.

    Args:
        dataset: Images and their objects.
        slices: How to cut them.
    """

    MIN_VISIBLE = 0.3

    def __init__(self, dataset: FolderDataset, slices: Slices):
        self.source, self.windows = dataset, list[tuple[int, Window]]()
        for index in range(len(dataset)):
            try:
                width, height = dataset.size_of(index)
            except DamagedError:  # reported when it is read
                width = height = 1
            self.windows += [(index, window) for window in slices.windows(height, width)]
        if len(self.windows) == len(dataset):
            log.warning("no training image is larger than `slices`, %d pixels, so none is cut", slices.size)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Sample:
        return self.source.transform(*self.read(index))

    def count_objects(self) -> int:
        return self.source.count_objects()

    def name_of(self, index: int) -> str:
        number, (x1, y1, x2, y2) = self.windows[index]
        return f"{self.source.name_of(number)} [{x1}:{x2}, {y1}:{y2}]"

    def check_header(self, index: int) -> None:
        number, (x1, y1, _, _) = self.windows[index]
        if (x1, y1) == (0, 0):  # once per image
            self.source.check_header(number)

    def read(self, index: int) -> Sample:
        """Return a window and the objects in it before `transform`."""
        number, (x1, y1, x2, y2) = self.windows[index]
        image, target = self.source.read(number)
        crop = partial(v2.functional.crop, top=y1, left=x1, height=y2 - y1, width=x2 - x1)
        area, boxes = box_area(target["boxes"].as_subclass(Tensor).double()), crop(target["boxes"])
        visible = box_area(boxes.as_subclass(Tensor).double()) >= self.MIN_VISIBLE * area
        kept = {
            "boxes": tv_tensors.wrap(boxes[visible], like=boxes),
            "labels": target["labels"][visible],
            "iscrowd": target["iscrowd"][visible],
            "image_id": target["image_id"],
        }
        if "masks" in target:
            masks = crop(target["masks"])
            kept["masks"] = tv_tensors.wrap(masks[visible], like=masks)
        return crop(image), kept
