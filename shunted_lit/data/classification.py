"""Labelled images in folders, one a class: ImageNet's layout."""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from shunted_lit.data.base import BaseDataModule
from shunted_lit.data.image_io import IMAGE_SUFFIXES, read_image, read_size
from shunted_lit.data.validation import LabelCheck

log = logging.getLogger(__name__)


class ClassFolderDataset(ImageFolder):
    """torchvision's, without hidden folders and files, and with a count of what it does not read."""

    def __init__(self, folder: Path, transform: Callable[[Image.Image], Any]):
        self.root_folder = folder
        self.seen: set[str] = set()  # folders
        self.places: dict[str, str] = {}  # the same, by where they really are
        self.unread: list[str] = [str(p) for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
        super().__init__(str(folder), transform, loader=read_image, is_valid_file=self.is_image, allow_empty=True)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = class_folders(Path(directory))
        return names, {name: label for label, name in enumerate(names)}

    def name_of(self, index: int) -> str:
        return self.samples[index][0]

    def check_header(self, index: int) -> None:
        """Raises DamagedError where the image, by its header, can't be read."""
        read_size(self.samples[index][0])

    def read(self, index: int) -> Image.Image:
        return read_image(self.samples[index][0])

    def check_loop(self, folder: str) -> None:
        """Raises ValueError where links lead to a folder twice, as one that holds itself does without end."""
        if folder in self.seen:
            return
        self.seen.add(folder)
        first = self.places.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            raise ValueError(f"{folder}: is a link to {first}, whose images would be read twice; remove it")

    def is_image(self, path: str) -> bool:
        self.check_loop(os.path.dirname(path))
        parts = Path(path).relative_to(self.root_folder).parts
        if any(part.startswith(".") for part in parts):
            return False
        if Path(path).suffix.lower() in IMAGE_SUFFIXES:
            return True
        self.unread.append(path)
        return False


def eval_transform_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a run scales and cuts images where it does not train: `crop_pct` and `interpolation`, if it has them."""
    kept = {key: settings[key] for key in ("crop_pct", "interpolation") if key in settings}
    return {key: "bicubic" if value == "random" else value for key, value in kept.items()}


class ClassificationDataModule(BaseDataModule):
    """Base of the classification data.

    A sample is an image (3, image_size, image_size), uint8, and a label from 0. Training images are cut,
    mirrored and distorted by timm's transforms; validation images are scaled and cut around their centre.

    Args:
        image_size: height and width in pixels.
        crop_pct: share of the scaled image's shorter side that validation keeps.
        interpolation: "bicubic", "bilinear", "nearest", or "random" for training.
        scale: least and greatest share of the area that a training image keeps.
        ratio: least and greatest width over height of that cut.
        flip: chance for a training image to be mirrored.
        color_jitter: range of brightness, contrast and saturation in training; not used where auto_augment is.
        auto_augment: timm's description of the policy, such as "rand-m9-mstd0.5-inc1"; null for none.
        repeats: times that an image is in an epoch, each time augmented anew, while the epoch stays as long: repeated
            augmentation (Hoffer et al., arXiv 1901.09335); 1 for none.
        batch_size: images a step, of each device.
        num_workers: processes that load and augment, of each device.
        check_images, skip_damaged: as in `BaseDataModule`.
    """

    offers = ("class",)
    whole_batches = True

    def __init__(
        self,
        image_size: int = 224,
        crop_pct: float = 0.875,
        interpolation: Literal["bicubic", "bilinear", "nearest", "random"] = "bicubic",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        color_jitter: float = 0.0,
        auto_augment: str | None = None,
        repeats: int = 1,
        batch_size: int = 128,
        num_workers: int = 2,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(batch_size, num_workers, None, check_images, skip_damaged)
        self.save_hyperparameters(logger=False)  # those of subclasses as well
        if image_size < 1 or not 0 < crop_pct <= 1 or repeats < 1:
            raise ValueError(
                f"image_size is {image_size}, crop_pct {crop_pct} and repeats {repeats}; "
                "at least 1, 0 to 1, and at least 1 are needed"
            )
        if not 0 <= flip <= 1 or color_jitter < 0 or scale[1] > 1:
            raise ValueError(
                f"flip is {flip}, color_jitter {color_jitter} and scale {scale}; "
                "0 to 1, at least 0, and up to 1 are needed"
            )
        for name, (low, high) in {"scale": scale, "ratio": ratio}.items():
            if not 0 < low <= high:
                raise ValueError(f"{name} is from {low} to {high}, but positive and rising numbers are needed")
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
        still = eval_transform_options({"crop_pct": crop_pct, "interpolation": interpolation})
        self.eval_transform = create_transform(**size, **still)


class ImageFolderDataModule(ClassificationDataModule):
    """`root/train/CLASS/*.JPEG` and `root/val/CLASS/*.JPEG`, any depth below CLASS; classes in alphabetical order.

    Args:
        root: the folder.
        train, val: folders of the splits, below `root`.
        keywords: further ones of `ClassificationDataModule`.

    Raises:
        ValueError: a folder that is not there, a class without images or missing in one of the splits, numbers out of
            bounds; while reading, an image that can't be read. Each names the path.
    """

    def __init__(self, root: str, train: str = "train", val: str = "val", **keywords: Any):
        super().__init__(**keywords)
        self.folders = {"train": Path(root, train), "val": Path(root, val)}
        if self.folders["train"] == self.folders["val"]:
            raise ValueError(f"{self.folders['train']} is to train and to validate; name a held-out folder for val")
        self.class_names = class_folders(self.folders["train"])

    def build_dataset(self, split: str, transform: Callable[[Image.Image], Any]) -> Dataset[Any]:
        folder = self.folders[split]
        differ_from = set(class_folders(folder)) ^ set(self.class_names)
        if differ_from:
            name = min(differ_from)
            there, here = self.folders["train"], folder
            if name not in self.class_names:
                there, here = here, there
            raise ValueError(
                f"{here / name}: no such folder, but {there / name} is there ({len(differ_from)} of "
                f"{len(self.class_names)} classes are in one split alone); both splits need all classes, with images"
            )
        dataset = ClassFolderDataset(folder, transform)
        check = LabelCheck()
        for label in sorted(set(range(len(self.class_names))) - set(dataset.targets)):
            check.fail(
                f"{folder / self.class_names[label]}: no image in this class; add some (they end in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}), or remove the folder from all splits"
            )
        self.report(check, folder)
        if dataset.unread:
            count, first = len(dataset.unread), dataset.unread[0]
            log.warning("%s: left out %d files that are no images of a class, such as %s", folder, count, first)
        return dataset


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in `folder`, which are the classes, in alphabetical order."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; it should hold a folder of images for each class")
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder}: no folder in it; it should hold one of images for each class")
    return names
