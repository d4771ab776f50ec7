"""Images with a class for each pixel: ADE20K as published, and any folders of images and PNG masks."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from shunted_lit.data.base import BaseDataModule, collate, float_image_transforms, random_color_distortion
from shunted_lit.data.image_io import (
    IMAGE_SUFFIXES,
    DamagedError,
    find_images,
    open_image,
    read_image,
    read_size,
    read_text,
)
from shunted_lit.data.splits import HeldOutDataModule
from shunted_lit.data.validation import LabelCheck, find_repeated
from shunted_lit.utils.checks import check_fraction, check_minimum, check_range
from shunted_lit.utils.labels import IGNORED

log = logging.getLogger(__name__)

MEAN_COLOUR = (124, 116, 104)  # of ImageNet, which normalization maps to 0; fills a crop beyond the image


class LabelMapDataModule(BaseDataModule):
    """Base of the segmentation data modules.

    A sample is an image (3, H, W), float32 in 0..1, and a label map (H, W), uint8: a class from 0, or 255 for none. A
    batch is two lists. Training images are resized, cropped to `crop_size` (pixels beyond the image have no class),
    mirrored and changed in colour; in evaluation images keep their sizes.

    A subclass sets `folders` and `class_names`.

    Args:
        crop_size: Height and width of a training image.
        short_side: Length that the shorter side of a training image is resized to before cropping; None keeps it.
        scale: Smallest and largest random factor of `short_side`; not used where that is None.
        flip: Probability of mirroring a training image.
        distort: Probability of changing the colours of a training image.
        options: Options of `BaseDataModule`.

    Raises:
        ValueError: An image has no mask, or a mask no image; two files differ only in the suffix; or there is no image.
            On reading: a mask differs in size from its image, has several channels, or a value that is no class. The
            message has the file.
    """

    collate_fn = staticmethod(collate)
    offers = ("map",)
    drop_incomplete = True  # UPerNet has BatchNorm on maps of one pixel
    folders: dict[str, tuple[Path, Path]]  # images and masks of each split
    first_class = 0  # value of the first class in the masks: 0, or 1 where 0 is no class

    def __init__(
        self,
        *,
        crop_size: PositiveInt = 512,
        short_side: PositiveInt | None = 512,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: ClosedUnitInterval = 0.5,
        distort: ClosedUnitInterval = 0.5,
        **options: Any,
    ):
        super().__init__(**options)
        check_minimum(1, crop_size=crop_size, short_side=short_side)
        check_range(scale=scale)
        check_fraction(flip=flip, distort=distort)
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

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return LabelMapDataset(self.find_files(split), self.num_classes, self.first_class, transform)

    def find_files(self, split: str) -> list[tuple[Path, Path]]:
        """Return image and mask of each sample of a split."""
        check = LabelCheck()
        files = pair_images_with_masks(*self.folders[split], check)
        self.report(check, self.folders[split][0])
        return files


class MaskFolderDataModule(HeldOutDataModule, LabelMapDataModule):
    """Images in `root/images/train/*.jpg` with masks of the same names, `root/masks/train/*.png`; the same for val.

    A mask is a PNG of one channel, or with a palette: a class from 0 for each pixel, 255 for none.

    Args:
        root: Folder that the other paths are relative to.
        names: Names of the classes; None to read `root/classes.txt`, one per line.
        train_images: Folder of the training images, which may be at any depth.
        train_masks: Folder of the training masks.
        val_images: Folder of the validation images.
        val_masks: Folder of the validation masks.
        options: Options of `LabelMapDataModule` and `HeldOutDataModule`.

    Raises:
        ValueError: As `LabelMapDataModule`; or the number of names is not 2 to 255.
    """

    def __init__(
        self,
        root: str,
        *,
        names: list[str] | None = None,
        train_images: str = "images/train",
        train_masks: str = "masks/train",
        val_images: str = "images/val",
        val_masks: str = "masks/val",
        **options: Any,
    ):
        super().__init__(**options)
        self.root = base = Path(root)
        self.folders = {
            "train": (base / train_images, base / train_masks),
            "val": (base / val_images, base / val_masks),
        }
        self.class_names = read_class_names(base / "classes.txt") if names is None else list(names)
        if not 2 <= len(self.class_names) <= IGNORED:
            raise ValueError(f"`names` must hold 2 to {IGNORED} names, got {len(self.class_names)}.")

    def find_files(self, split: str) -> list[tuple[Path, Path]]:
        images = {key: folders[0] for key, folders in self.folders.items()}
        files = super().find_files(self.split_to_read(split, **images))
        return [files[row] for row in self.select(split, [image for image, _ in files])]


class ADE20KDataModule(LabelMapDataModule):
    """ADE20K's scene parsing benchmark (Zhou et al., CVPR 2017) as published, ADEChallengeData2016.

    `root/images/{training,validation}/*.jpg` and `root/annotations/{training,validation}/*.png`: 0 for no class, 1 to
    150 for the classes, which are mapped to 0 to 149. Their names are read from `root/objectInfo150.txt`, if it exists.

    Args:
        root: Folder of the data set.
        options: Options of `LabelMapDataModule`.

    Raises:
        ValueError: As `LabelMapDataModule`; or `objectInfo150.txt` does not name the 150 classes.
    """

    CLASSES = 150
    first_class = 1

    def __init__(self, root: str, **options: Any):
        super().__init__(**options)
        base = Path(root)
        splits = {"train": "training", "val": "validation"}
        self.folders = {key: (base / "images" / name, base / "annotations" / name) for key, name in splits.items()}
        self.class_names = self.read_object_info(base / "objectInfo150.txt")

    @classmethod
    def read_object_info(cls, file: Path) -> list[str]:
        """Read the first name of each class from lines `Idx Ratio Train Val Stuff Name`.

        Without the file, warn and return the numbers from 0 as names.
        """
        if not file.is_file():
            log.warning("%s: no such file; the classes are named by their numbers, from 0", file)
            return [str(number) for number in range(cls.CLASSES)]
        rows = [line.split(None, 5) for line in read_text(file).splitlines()]
        names = {int(row[0]): row[5].split(",")[0].strip() for row in rows if len(row) == 6 and row[0].isdecimal()}
        if sorted(names) != list(range(1, cls.CLASSES + 1)):
            raise ValueError(
                f"{file}: expected a line for each class from 1 to {cls.CLASSES}, got {len(names)} classes."
            )
        return [names[number] for number in range(1, cls.CLASSES + 1)]


class LabelMapDataset(Dataset[Any]):
    """Images and label maps on disk, read on access.

    Args:
        files: Image and mask of each sample.
        num_classes: Number of classes.
        first_class: Value of the first class in the masks: 0, or 1 where 0 is no class.
        transform: Function of image and label map.

    Raises:
        DamagedError: On access: a mask cannot be read, has several channels, differs in size from its image, or has a
            value that is no class.
    """

    def __init__(
        self, files: list[tuple[Path, Path]], num_classes: int, first_class: int, transform: Callable[..., Any]
    ):
        self.files, self.num_classes, self.first_class, self.transform = files, num_classes, first_class, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(*self.read(index))

    def name_of(self, index: int) -> str:
        return str(self.files[index][0])

    def check_header(self, index: int) -> None:
        """Raise DamagedError where the headers of image or mask cannot be read, or their sizes differ."""
        path, mask = self.files[index]
        with open_mask(mask) as opened:
            size = opened.size
        if read_size(path) != size:
            self.read(index)  # a header may lack the orientation

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image and label map, with classes from 0, before `transform`."""
        path, mask = self.files[index]
        image = tv_tensors.Image(read_image(path))
        values = read_mask(mask)
        if values.shape != image.shape[-2:]:
            (mask_height, mask_width), (height, width) = values.shape, image.shape[-2:]
            raise DamagedError(
                f"{mask}: is {mask_width} x {mask_height}, but its image {path.name} is {width} x {height}."
            )
        last_class = self.first_class + self.num_classes - 1
        wrong, counts = np.unique(values[(values > last_class) & (values != IGNORED)], return_counts=True)
        if len(wrong):
            shown = ", ".join(f"{value} ({count} pixels)" for value, count in zip(wrong[:5], counts, strict=False))
            raise DamagedError(
                f"{mask}: has {len(wrong)} values that are no class: {shown}; {self.first_class} to {last_class} are "
                f"classes, {IGNORED}{' and 0 are' if self.first_class else ' is'} no class; correct the mask."
            )
        is_class = (values >= self.first_class) & (values != IGNORED)
        label_map = np.where(is_class, values - self.first_class, IGNORED).astype(np.uint8)
        return image, tv_tensors.Mask(torch.from_numpy(label_map))


@contextmanager
def open_mask(path: Path) -> Iterator[Image.Image]:
    """Open a PNG of one channel, or with a palette; errors become DamagedError as in `open_image`."""
    with open_image(path, kind="mask") as image:
        if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
            raise ValueError(f"mode {image.mode}; expected one channel or a palette, with a class for each pixel")
        yield image


def read_mask(path: Path) -> np.ndarray:
    """Read the values (H, W), int64, of a mask: the indices of the colours where it has a palette.

    Raises:
        DamagedError: The file cannot be read, or has several channels.
    """
    with open_mask(path) as image:
        return np.asarray(image).astype(np.int64)


def pair_images_with_masks(images: Path, masks: Path, check: LabelCheck) -> list[tuple[Path, Path]]:
    """Return the images below a folder, sorted, each with the PNG of the same relative name below `masks`.

    Images without a mask, masks without an image, and names with several suffixes are recorded as faults.

    Raises:
        ValueError: A folder is missing or empty.
    """
    paths: dict[Path, dict[Path, Path]] = {}  # by folder, then by relative name without suffix
    for folder, suffixes in ((images, IMAGE_SUFFIXES), (masks, {".png"})):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder.")
        files = [path for path in find_images(folder) if path.suffix.lower() in suffixes]
        if not files:
            raise ValueError(f"{folder}: no files found; their names must end in {', '.join(sorted(suffixes))}.")
        names = [path.relative_to(folder).with_suffix("") for path in files]
        for name in find_repeated(names):
            check.fail(f"{folder}: {name} exists with several suffixes; keep one.")
        paths[folder] = dict(zip(names, files, strict=True))
    for folder, other, kind in ((images, masks, "mask"), (masks, images, "image")):
        for name in sorted(paths[folder].keys() - paths[other].keys()):
            check.fail(
                f"{paths[folder][name]}: has no {kind} in {other}; each image needs a PNG of its name, and each PNG an "
                "image."
            )
    return [(path, paths[masks][name]) for name, path in paths[images].items() if name in paths[masks]]


def read_class_names(file: Path) -> list[str]:
    """Read the names of the classes, one per line. Raise ValueError where a name is repeated."""
    if not file.exists():
        raise ValueError(f"{file}: no such file; write one class name per line, or set `names`.")
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if repeated := find_repeated(names):
        raise ValueError(f"{file}: has the name {repeated[0]!r} twice.")
    return names
