"""Labelled images in one folder per class: ImageNet's layout."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveInt
from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from shunted_lit.data.base import BaseDataModule
from shunted_lit.data.image_io import IMAGE_ENDINGS, IMAGE_SUFFIXES, read_image, read_size
from shunted_lit.data.splits import HeldOutDataModule
from shunted_lit.data.validation import LabelCheck
from shunted_lit.utils.checks import check_fraction, check_minimum, check_positive, check_range

log = logging.getLogger(__name__)


class ClassFolderDataset(ImageFolder):
    """torchvision's ImageFolder without hidden files and folders; lists the files that it skips in `skipped`.

    Args:
        folder: Folder with one folder per class.
        transform: Function of a PIL image.

    Raises:
        ValueError: Links lead to one folder twice.
    """

    samples: list[tuple[str, int]]  # path and label

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]):
        self.root_folder = folder
        self.visited: set[str] = set()
        self.first_paths: dict[str, str] = {}  # of each folder, by its path without links
        self.skipped: list[str] = [str(p) for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        super().__init__(str(folder), transform, loader=read_image, is_valid_file=self.is_image, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = list_class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the images with these indices."""
        self.samples = self.imgs = [self.samples[row] for row in rows]
        self.targets = [label for _, label in self.samples]

    def name_of(self, index: int) -> str:
        return self.samples[index][0]

    def check_header(self, index: int) -> None:
        """Raise DamagedError where the image's header cannot be read."""
        read_size(self.samples[index][0])

    def read(self, index: int) -> Image.Image:
        return read_image(self.samples[index][0])

    def check_visited_once(self, folder: str) -> None:
        """Raise ValueError where links lead to a folder twice, as a link to a parent folder does without end."""
        if folder in self.visited:
            return
        self.visited.add(folder)
        first = self.first_paths.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise ValueError(f"{folder}: is a link to {first}, whose images would be read twice; remove it.")

    def is_image(self, path: str) -> bool:
        self.check_visited_once(os.path.dirname(path))
        if any(part.startswith(".") for part in Path(path).relative_to(self.root_folder).parts):
            return False
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            return True
        self.skipped.append(path)
        return False


def eval_transform_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of evaluation, `crop_pct` and `interpolation`, from a data module's settings, if present."""
    options = {key: settings[key] for key in ("crop_pct", "interpolation") if key in settings}
    return {key: "bicubic" if value == "random" else value for key, value in options.items()}


class ClassificationDataModule(BaseDataModule):
    """Base of the classification data modules.

    A sample is an image (3, image_size, image_size), uint8, and a label from 0. Training images are cropped, mirrored
    and distorted by timm's transforms; validation images are resized and cropped around their centre.

    Args:
        image_size: Height and width in pixels.
        crop_pct: Fraction of the resized image's shorter side that validation keeps.
        interpolation: "bicubic", "bilinear", "nearest", or "random", which chooses one for each training image.
        scale: Smallest and largest fraction of the area that a training crop keeps.
        ratio: Smallest and largest width over height of that crop.
        flip: Probability of mirroring a training image.
        color_jitter: Strength of random changes of brightness, contrast and saturation in training; `auto_augment`
            replaces them.
        auto_augment: timm's name of an augmentation policy, such as "rand-m9-mstd0.5-inc1"; None for none.
        repeats: Repeated augmentation (Hoffer et al., arXiv 1901.09335): occurrences of an image in an epoch, each
            augmented differently, while the epoch keeps its length; 1 for none.
        batch_size: Batch size per device.
        options: Options of `BaseDataModule`.
    """

    offers = ("class",)
    drop_incomplete = True

    def __init__(
        self,
        *,
        image_size: PositiveInt = 224,
        crop_pct: ClosedUnitInterval = 0.875,
        interpolation: Literal["bicubic", "bilinear", "nearest", "random"] = "bicubic",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: ClosedUnitInterval = 0.5,
        color_jitter: NonNegativeFloat = 0.0,
        auto_augment: str | None = None,
        repeats: PositiveInt = 1,
        batch_size: PositiveInt = 128,
        **options: Any,
    ):
        super().__init__(batch_size=batch_size, **options)
        check_minimum(1, image_size=image_size, repeats=repeats)
        check_minimum(0, color_jitter=color_jitter)
        check_positive(crop_pct=crop_pct)
        check_range(scale=scale, ratio=ratio)
        check_fraction(crop_pct=crop_pct, flip=flip, scale=scale[1])
        self.repeats = repeats
        size: dict[str, Any] = {"input_size": image_size, "normalize": False}
        self.train_transform = create_transform(
            **size,
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=flip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            interpolation=interpolation,
        )
        evaluation = eval_transform_options({"crop_pct": crop_pct, "interpolation": interpolation})
        self.eval_transform = create_transform(**size, **evaluation)


class ImageFolderDataModule(HeldOutDataModule, ClassificationDataModule):
    """Images in `root/train/CLASS/*.JPEG` and `root/val/CLASS/*.JPEG`, at any depth below CLASS.

    Classes are in alphabetical order.

    Args:
        root: Folder that the other paths are relative to.
        train: Folder of the training split; "." for `root/CLASS/*.JPEG`, of which `val_fraction` holds out a part.
        val: Folder of the validation split.
        options: Options of `ClassificationDataModule` and `HeldOutDataModule`.

    Raises:
        ValueError: A folder is missing; a class has no images, or is missing in one of the splits. On reading: an image
            that cannot be read. The message has the path.
    """

    def __init__(self, root: str, *, train: str = "train", val: str = "val", **options: Any):
        super().__init__(**options)
        self.root = Path(root)
        self.folders = {"train": Path(root, train), "val": Path(root, val)}
        if self.folders["train"] == self.folders["val"] and not self.holds_out:
            raise ValueError(f"`val` must be a held-out folder, got {self.folders['train']}, the folder of `train`.")
        self.class_names = list_class_folders(self.folders["train"])

    def build_dataset(self, split: str, transform: Callable[[Image.Image], Any]) -> Dataset[Any]:
        folder = self.folders[self.split_to_read(split, **self.folders)]
        only_in_one = set(list_class_folders(folder)) ^ set(self.class_names)
        if only_in_one:
            name = min(only_in_one)
            with_it, without = self.folders["train"], folder
            if name not in self.class_names:
                with_it, without = without, with_it
            raise ValueError(
                f"{without / name}: no such folder, but {with_it / name} exists ({len(only_in_one)} of "
                f"{len(self.class_names)} classes are in one split only); both splits need all classes, with images."
            )
        dataset = ClassFolderDataset(folder, transform)
        dataset.keep(self.select(split, [path for path, _ in dataset.samples]))
        check = LabelCheck()
        missing = set(range(len(self.class_names))) - set(dataset.targets)
        for label in [] if self.holds_out and split == "val" else sorted(missing):
            check.fail(
                f"{folder / self.class_names[label]}: no images in this class{' to train on' if self.holds_out else ''}"
                f"; add some (their names must end in {IMAGE_ENDINGS}), or remove the folder from all splits."
            )
        self.report(check, folder)
        if skipped := dataset.skipped:
            log.warning(
                "%s: skipping %d files that are not images of a class, such as %s", folder, len(skipped), skipped[0]
            )
        return dataset


def list_class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, which are the classes, in alphabetical order."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected a folder with one folder of images per class.")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: has no folders; expected one folder of images per class.")
    return names
