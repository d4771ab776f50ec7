"""Images without labels, to predict on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import PositiveInt
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor, to_dtype

from shunted_lit.data.base import BaseDataModule, collate
from shunted_lit.data.image_io import IMAGE_ENDINGS, find_images, read_image
from shunted_lit.data.sampling import RankSampler
from shunted_lit.data.validation import find_repeated
from shunted_lit.utils.files import fingerprint_files
from shunted_lit.utils.slices import Slices


class ImagesDataModule(BaseDataModule):
    """Images of a folder, at any depth, for `shunted-lit predict`.

    A sample is an image and its index in the order of the names. Images keep their size, as float32 in 0..1, and a
    batch is a list. With `image_size` they are resized and cropped as for the validation of a classifier, and a batch
    is a tensor (B, 3, image_size, image_size), uint8.

    Args:
        images: Folder, or a single image.
        image_size: As in `ClassificationDataModule`; set by the checkpoint in `shunted-lit`. None keeps sizes.
        crop_pct: As in `ClassificationDataModule`; set by the checkpoint in `shunted-lit`.
        interpolation: As in `ClassificationDataModule`; set by the checkpoint in `shunted-lit`.
        slices: Side of the windows, in pixels, into which a detector's images are cut; null predicts whole images.
        overlap: Least overlap of neighbouring windows, as a fraction of their side.
        batch_size: Batch size per device.
        options: Options of `BaseDataModule`.

    Raises:
        ValueError: There is no such folder, no image in it, or two images whose names differ only in the suffix, so
            that their outputs would have one name. On reading: an image that cannot be read.
    """

    offers = ("none",)
    collate_fn: Callable[[list[Any]], Any] | None = staticmethod(collate)

    def __init__(
        self,
        images: str,
        *,
        image_size: int | None = None,
        crop_pct: float = 1.0,
        interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic",
        slices: int | None = None,
        overlap: float = 0.2,
        batch_size: PositiveInt = 1,
        **options: Any,
    ):
        super().__init__(batch_size=batch_size, **options)
        self.slicing = None if slices is None else Slices(slices, overlap)
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a resumed run may leave a rank nothing to do
        self.preparation = {"image_size": image_size, "crop_pct": crop_pct, "interpolation": interpolation}
        self.to_do: Callable[[], Sequence[int]] | None = None  # returns the images of this rank; None for all
        self.root = Path(images)
        self.is_folder = self.root.is_dir()
        if self.is_folder:
            self.paths = [path for path in find_images(self.root) if path.is_file()]
        elif self.root.is_file():
            self.root, self.paths = self.root.parent, [self.root]
        else:
            raise ValueError(f"{images}: no such folder or image.")
        if not self.paths:
            raise ValueError(f"{images}: no images found; their names must end in {IMAGE_ENDINGS}.")
        if repeated := find_repeated(self.names):
            raise ValueError(f"{self.root / repeated[0]}: exists with several suffixes; rename or move all but one.")
        self.transform: Any = None
        if image_size is not None:
            self.collate_fn = None
            self.transform = create_transform(
                input_size=image_size, normalize=False, interpolation=interpolation, crop_pct=crop_pct
            )

    def state(self) -> dict[str, Any]:
        """Return what differs once images are added, removed, changed or prepared differently."""
        names = [str(path.relative_to(self.root)) for path in self.paths]
        return {
            **self.preparation,
            "slices": None if self.slicing is None else asdict(self.slicing),
            "folder": str(self.root.resolve()),
            "number of images": len(names),
            "names, sizes and times of images": fingerprint_files(self.paths, names),
        }

    @property
    def names(self) -> list[str]:
        """Path of each image within the folder, without its suffix."""
        return [path.relative_to(self.root).with_suffix("").as_posix() for path in self.paths]

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        raise ValueError("ImagesDataModule has no classes and is only for predict; choose other data with `--data`.")

    def would_read(self, folder: Path) -> bool:
        """Return whether the next run would read images in `folder`."""
        return self.is_folder and folder.resolve().is_relative_to(self.root.resolve())

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise ValueError(f"ImagesDataModule has no labels and is only for predict, not {stage}; choose other data.")
        self.datasets = {"predict": ImageFiles(self.paths, self.transform)}

    def predict_dataloader(self) -> DataLoader[Any]:
        sampler = None if self.to_do is None else RankSampler(self.to_do(), *self.world_size_and_rank())
        return self.build_loader(self.datasets["predict"], sampler=sampler)


class ImageFiles(Dataset[Any]):
    """Images on disk, read on access, each with its index."""

    def __init__(self, paths: list[Path], transform: Any):
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = read_image(self.paths[index])
        if self.transform is not None:
            return self.transform(image), index
        return to_dtype(pil_to_tensor(image), scale=True), index
