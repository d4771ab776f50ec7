"""Images with a class for each pixel: ADE20K's published layout, and any folders of images and PNG masks."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from shunted_lit.data.base import BaseDataModule, collate, float_image_transforms, random_color_distortion
from shunted_lit.data.image_io import (
    FORMATS,
    IMAGE_SUFFIXES,
    UNREADABLE,
    DamagedError,
    read_image,
    read_lines,
    read_size,
)
from shunted_lit.data.validation import LabelCheck
from shunted_lit.utils.labels import IGNORED

log = logging.getLogger(__name__)

MEAN_COLOUR = (124, 116, 104)  # of ImageNet, which is 0 once normalized: what a crop beyond the image is filled with


class LabelMapDataModule(BaseDataModule):
    """Base of the segmentation data.

    A sample is an image (3, H, W), float32 in 0..1, and a label map (H, W), uint8: a class from 0, or 255 for none.
    Batches are two lists. In training, images are scaled, cut to `crop_size` (beyond the image lies no class), mirrored
    and changed in colour; in evaluation they come as they are, in sizes of their own.

    Args:
        batch_size: images a step, of each device.
        num_workers: processes that load and augment, of each device.
        crop_size: height and width of a training image.
        short_side: what the shorter side of a training image is scaled to first; null for its own size.
        scale: least and greatest factor on that, drawn at random; only where `short_side` is given.
        flip, distort: chance for a training image to be mirrored, to change its colours.
        check_images, skip_damaged: as in `BaseDataModule`.
    """

    collate_fn = staticmethod(collate)
    offers = ("map",)
    whole_batches = True  # UPerNet has BatchNorm on maps of one pixel

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int = 2,
        crop_size: int = 512,
        short_side: int | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        distort: float = 0.5,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(batch_size, num_workers, None, check_images, skip_damaged)
        if crop_size < 1 or (short_side is not None and short_side < 1) or not 0 < scale[0] <= scale[1]:
            raise ValueError(
                f"crop_size is {crop_size}, short_side {short_side} and scale {scale}; at least 1, at least 1 or null, "
                "and two positive, rising numbers are needed"
            )
        resize = []
        if short_side is not None:
            low, high = (max(round(short_side * factor), 1) for factor in scale)
            resize = [v2.RandomShortestSize(list(range(low, high + 1)), max_size=4 * high)]  # ADE20K's 2048 for 512
        fill: dict[Any, Any] = {tv_tensors.Image: MEAN_COLOUR, tv_tensors.Mask: IGNORED}
        self.train_transform = v2.Compose(
            [
                *resize,
                v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
                v2.RandomHorizontalFlip(flip),
                random_color_distortion(distort),
                *float_image_transforms(),
            ]
        )
        self.eval_transform = v2.Compose(float_image_transforms())


class MaskFolderDataModule(LabelMapDataModule):
    """`root/images/train/*.jpg` with `root/masks/train/*.png` of equal names, and the same for val.

    A mask is a PNG of one channel, or with a palette: a class from 0 for each pixel, 255 for none.

    Args:
        root: folder that the other paths start from.
        names: names of the classes; null to read `root/classes.txt`, a line a class.
        train_images, train_masks, val_images, val_masks: folder of each split, any depth below them.
        batch_size, num_workers, crop_size, short_side, scale, flip, distort, check_images, skip_damaged: as in
            `LabelMapDataModule`.

    Raises:
        ValueError: naming the file, and how many there are, where an image has no mask or a mask no image, where two
            images share one, where there is no image; while reading, a mask of another size than its image, of several
            channels, or with a value that is no class.
    """

    def __init__(
        self,
        root: str,
        names: list[str] | None = None,
        train_images: str = "images/train",
        train_masks: str = "masks/train",
        val_images: str = "images/val",
        val_masks: str = "masks/val",
        batch_size: int = 16,
        num_workers: int = 2,
        crop_size: int = 512,
        short_side: int | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        distort: float = 0.5,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(
            batch_size, num_workers, crop_size, short_side, scale, flip, distort, check_images, skip_damaged
        )
        self.save_hyperparameters(logger=False)
        base = Path(root)
        self.folders = {
            "train": (base / train_images, base / train_masks),
            "val": (base / val_images, base / val_masks),
        }
        self.class_names = read_names(base / "classes.txt") if names is None else list(names)
        if not 2 <= len(self.class_names) <= IGNORED:
            raise ValueError(f"there are {len(self.class_names)} names, but 2 to {IGNORED} classes are possible")

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        check = LabelCheck()
        files = pairs(*self.folders[split], check)
        self.report(check, self.folders[split][0])
        return LabelMapDataset(files, len(self.class_names), first_class=0, transform=transform)


class ADE20KDataModule(LabelMapDataModule):
    """ADE20K's scene parsing benchmark (Zhou et al., CVPR 2017) as it is published, ADEChallengeData2016.

    `root/images/{training,validation}/*.jpg`, `root/annotations/{training,validation}/*.png`: 0 for no class, 1 to 150
    for the classes, which here run from 0. Their names are read from `root/objectInfo150.txt`, where it is there.

    Args:
        root: the folder.
        batch_size, num_workers, crop_size, short_side, scale, flip, distort, check_images, skip_damaged: as in
            `LabelMapDataModule`.

    Raises:
        ValueError: as `MaskFolderDataModule`.
    """

    CLASSES = 150

    def __init__(
        self,
        root: str,
        batch_size: int = 16,
        num_workers: int = 2,
        crop_size: int = 512,
        short_side: int | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        distort: float = 0.5,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(
            batch_size, num_workers, crop_size, short_side, scale, flip, distort, check_images, skip_damaged
        )
        self.save_hyperparameters(logger=False)
        self.root = Path(root)
        self.class_names = self.read_object_info(self.root / "objectInfo150.txt")

    @classmethod
    def read_object_info(cls, file: Path) -> list[str]:
        """The first name of each class, from lines `Idx Ratio Train Val Stuff Name`; numbers where there is no file."""
        if not file.is_file():
            log.warning("%s: no such file; classes are named by their numbers, from 0", file)
            return [str(number) for number in range(cls.CLASSES)]
        rows = [line.split(None, 5) for line in read_lines(file)]
        names = {int(row[0]): row[5].split(",")[0].strip() for row in rows if len(row) == 6 and row[0].isdecimal()}
        if sorted(names) != list(range(1, cls.CLASSES + 1)):
            raise ValueError(f"{file}: has {len(names)} lines of a class, but needs 1 to {cls.CLASSES}, each once")
        return [names[number] for number in range(1, cls.CLASSES + 1)]

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        folder = {"train": "training", "val": "validation"}[split]
        check = LabelCheck()
        files = pairs(self.root / "images" / folder, self.root / "annotations" / folder, check)
        self.report(check, self.root)
        return LabelMapDataset(files, self.CLASSES, first_class=1, transform=transform)


class LabelMapDataset(Dataset[Any]):
    """Images and label maps on disk, read when asked for.

    Args:
        files: an image and its mask each.
        num_classes: number of classes.
        first_class: value of the first class in the masks: 0, or 1 where 0 stands for no class.
        transform: applied to (image, label map).

    Raises:
        ValueError: on access, naming the file: a mask that can't be read, of several channels, of another size than
            its image, or with a value that is no class, and how many pixels have it.
    """

    def __init__(
        self, files: list[tuple[Path, Path]], num_classes: int, first_class: int, transform: Callable[..., Any]
    ):
        self.files, self.num_classes, self.first_class, self.transform = files, num_classes, first_class, transform

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        return str(self.files[index][0])

    def check_header(self, index: int) -> None:
        """Raises DamagedError where image or mask, by their headers, can't be read, or are of different sizes."""
        path, mask = self.files[index]
        with open_mask(mask) as opened:
            size = opened.size
        if read_size(path) != size:
            self.read(index)  # which is sure

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.read(index))

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image and label map as they are on disk, classes from 0."""
        path, mask = self.files[index]
        image = tv_tensors.Image(read_image(path))
        values = read_mask(mask)
        if values.shape != image.shape[-2:]:
            height, width = image.shape[-2:]
            raise DamagedError(
                f"{mask}: is {values.shape[1]} x {values.shape[0]}, but its image {path.name} is {width} x {height}"
            )
        last = self.num_classes - 1 + self.first_class
        wrong = (values > last) & (values != IGNORED)
        if wrong.any():
            found = dict(zip(*(part.tolist() for part in np.unique(values[wrong], return_counts=True)), strict=True))
            told = ", ".join(f"{value} ({count} pixels)" for value, count in list(found.items())[:5])
            raise DamagedError(
                f"{mask}: holds {len(found)} values that are no class: {told}; {self.first_class} to {last} are "
                f"classes, {IGNORED}{' and 0 stand' if self.first_class else ' stands'} for none"
            )
        if self.first_class:
            values = np.where((values < self.first_class) | (values == IGNORED), IGNORED, values - self.first_class)
        return image, tv_tensors.Mask(torch.from_numpy(values.astype(np.uint8)))


@contextmanager
def open_mask(path: Path) -> Iterator[Image.Image]:
    """A PNG of one channel, or with a palette. Raises DamagedError naming the file, also for what is read meanwhile."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
                raise ValueError(f"mode {image.mode}: one channel is needed, or a palette, with a class for each pixel")
            yield image
    except DamagedError:
        raise
    except UNREADABLE as error:
        raise DamagedError(f"{path}: not a readable mask ({error})") from error


def read_mask(path: Path) -> np.ndarray:
    """Values (H, W) of a mask; numbers of the colours where it has a palette."""
    with open_mask(path) as image:
        return np.asarray(image).astype(np.int64)


def pairs(images: Path, masks: Path, check: LabelCheck) -> list[tuple[Path, Path]]:
    """Images below a folder, sorted, each with the PNG of equal relative name below the other folder.

    Faults for `check`: images without masks or the other way round, names that are there under several suffixes.

    Raises:
        ValueError: a folder that is not there or empty.
    """
    found = {}
    for folder, suffixes in ((images, IMAGE_SUFFIXES), (masks, {".png"})):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
        if not files:
            raise ValueError(f"{folder}: no files in it that end in {', '.join(sorted(suffixes))}")
        names = [path.relative_to(folder).with_suffix("") for path in files]
        for name in (name for name, count in Counter(names).items() if count > 1):
            check.fail(f"{folder}: {name} is there under several suffixes; keep one")
        found[folder] = dict(zip(names, files, strict=True))
    for some, others, what in ((images, masks, "mask"), (masks, images, "image")):
        for name in sorted(found[some].keys() - found[others].keys()):
            check.fail(f"{found[some][name]}: has no {what} in {others}; each image needs a PNG of its name, and each "
                       "PNG an image")  # fmt: skip
    return [(path, found[masks][name]) for name, path in found[images].items() if name in found[masks]]


def read_names(file: Path) -> list[str]:
    """Names of the classes, a line each. Raises ValueError naming the file, where a name is repeated."""
    if not file.exists():
        raise ValueError(f"{file}: no such file; it should hold a line a class, or give names")
    names = [line.strip() for line in read_lines(file) if line.strip()]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file}: names {repeated[0]!r} twice")
    return names
