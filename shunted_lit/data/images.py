"""Plain images to predict on."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from shunted_lit.data.base import BaseDataModule, collate
from shunted_lit.data.image_io import IMAGE_SUFFIXES, read_image, warn_unsupported_images
from shunted_lit.data.sampling import RankSampler
from shunted_lit.utils.files import fingerprint_files

log = logging.getLogger(__name__)


class ImagesDataModule(BaseDataModule):
    """Images of a folder, at any depth, for `shunted-lit predict`; there is nothing to train on.

    A sample is an image, and its number in the order of the names. Images come as they are, float32 in 0..1, a batch a
    list; where `image_size` is given, they are scaled and cut as for the validation of a classifier, a batch a tensor
    (B, 3, image_size, image_size), uint8.

    Args:
        images: the folder, or one image.
        image_size, crop_pct, interpolation: as in `ImageFolderDataModule`; from the checkpoint, in `shunted-lit`.
        batch_size: images a step, of each device.
        num_workers: processes that load, of each device.

    Raises:
        ValueError: no such folder, no image in it, or two whose names differ in the suffix alone, so that what is
            written for them would have one name; while reading, an image that can't be read.
    """

    offers = ("none",)
    collate_fn: Callable[[list[Any]], Any] | None = staticmethod(collate)

    def __init__(
        self,
        images: str,
        image_size: int | None = None,
        crop_pct: float = 1.0,
        interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
        batch_size: int = 1,
        num_workers: int = 2,
    ):
        super().__init__(batch_size, num_workers)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # where few parts are left to do
        self.prepared = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
        self.to_do: Callable[[], Sequence[int]] | None = None  # images of this process; None for all
        self.root = Path(images)
        self.is_folder = self.root.is_dir()
        if self.is_folder:
            files = sorted(path for path in self.root.rglob("*") if path.is_file())
            self.paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
            warn_unsupported_images(images, files)
        elif self.root.is_file():
            self.root, self.paths = self.root.parent, [self.root]
        else:
            raise ValueError(f"{images}: no such folder or image")
        if not self.paths:
            raise ValueError(f"{images}: no images in it; they end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        if repeated := [name for name, count in Counter(self.names).items() if count > 1]:
            raise ValueError(f"{self.root / repeated[0]}: is there under several suffixes; rename or move one")
        self.transform: Any = None
        if image_size is not None:
            self.collate_fn = None
            self.transform = create_transform(
                input_size=image_size, normalize=False, interpolation=interpolation, crop_pct=crop_pct
            )

    def state(self) -> dict[str, Any]:
        """By which it is known whether images were added, removed or changed, or are prepared in another way."""
        names = [str(path.relative_to(self.root)) for path in self.paths]
        return {**self.prepared, "folder": str(self.root.resolve()), "number of images": len(names),
                "names, sizes and times of images": fingerprint_files(self.paths, names)}  # fmt: skip

    @property
    def names(self) -> list[str]:
        """Path of each image within the folder, without its suffix."""
        return [path.relative_to(self.root).with_suffix("").as_posix() for path in self.paths]

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        raise ValueError("ImagesDataModule holds images alone, to predict on; name other data by --data")

    def would_read(self, folder: Path) -> bool:
        """Whether images in `folder` would be read by the next run."""
        return self.is_folder and folder.resolve().is_relative_to(self.root.resolve())

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError(f"ImagesDataModule holds images alone, which can't {stage}; name other data")
        self.datasets = {"predict": Images(self.paths, self.transform)}

    def predict_dataloader(self) -> DataLoader[Any]:
        sampler = None if self.to_do is None else RankSampler(self.to_do(), *self.replicas_and_rank())
        return self.loader(self.datasets["predict"], sampler=sampler)


class Images(Dataset[Any]):
    """Images on disk, read when asked for, each with its number."""

    def __init__(self, paths: list[Path], transform: Any):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        if self.transform is not None:
            return self.transform(image), index
        return to_dtype(pil_to_tensor(image), scale=True), index
