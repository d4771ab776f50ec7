"""What all data share: loaders, the forms of a sample, augmentation, and how what is wrong on disk is reported."""

import functools
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from shunted_lit.data.image_io import IMAGE_SUFFIXES, DamagedError, read_image, read_size
from shunted_lit.data.masks import Segment, draw_mask
from shunted_lit.data.sampling import RankSampler, SeededDataset, TrainingSampler, ignore_signals_in_worker
from shunted_lit.data.validation import DataError, LabelCheck, find_damaged_samples

log = logging.getLogger(__name__)

Target = dict[str, Any]
Sample = tuple[Tensor, Target]


def annotation_covers(given: str, wanted: str) -> bool:
    """Whether data that come with `given` are what a task learns from: masks have boxes besides."""
    return given == wanted or (given, wanted) == ("masks", "boxes")


def collate(samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Images and targets as two lists: images keep their own sizes."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class BaseDataModule(LightningDataModule):
    """What all data share. A subclass sets `class_names`, the transforms, and builds the data set of a split.

    Order and augmentation of the training images follow from the run's seed, the epoch and the place in it, whatever
    the number of workers; a checkpoint in mid-epoch tells the place, and a resumed run goes on there.

    It calls `save_hyperparameters(logger=False)`: loggers refuse a name that the task has with another value, such as
    `short_side`, and config.yaml has all of them.

    `annotation` tells what an image comes with, and a task what it learns from, in the same words: "class", "boxes",
    "masks" (boxes, and a mask for each), or "map" (a class for each pixel). `offers` are those a subclass can give.

    A data set of files has `look(index)`, which reads headers, and `read(index)`, which reads a sample; both raise
    ValueError where something is wrong.

    Args:
        batch_size: images a step, of each device.
        num_workers: processes that load and augment, of each device.
        check_images: read the headers of all files before training, so that what is damaged is told at the start.
        skip_damaged: up to so many training images that can't be read are left out, the next one taking their place,
            and told; one more, or one in evaluation, is an error.
    """

    class_names: list[str]
    train_transform: Callable[..., Any]
    eval_transform: Callable[..., Any]
    collate_fn: Callable[[list[Any]], Any] | None = None
    offers: tuple[str, ...]
    repeats = 1  # times that a training image is in an epoch
    whole_batches = False  # leave out a last, smaller training batch, as BatchNorm and mixup may need

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        annotation: str | None = None,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__()
        kind = type(self)
        if kind.setup is BaseDataModule.setup and kind.build_dataset is BaseDataModule.build_dataset:
            raise ValueError(f"{kind.__name__} is a base of data modules; name one that reads data, by --data")
        self.annotation = annotation or self.offers[0]
        if self.annotation not in self.offers:
            raise ValueError(
                f"annotation is {self.annotation!r}, but {type(self).__name__} has {' or '.join(self.offers)}; "
                "choose other data, or another task or detector"
            )
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size is {batch_size} and num_workers {num_workers}; 1 and 0 are the least")
        if skip_damaged < 0:
            raise ValueError(f"skip_damaged is {skip_damaged}, but a number of images, 0 or more, is needed")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.check_images, self.skip_damaged = check_images, skip_damaged
        self.datasets: dict[str, Any] = {}
        self.seeded: SeededDataset | None = None
        self.faults: list[str] | None = None  # of labels, where they are gathered
        self.resumed: dict[str, int] = {}  # seed, epoch and batches of a checkpoint

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def run_seed(self) -> int:
        """That of the run's checkpoint, or Lightning's, or any; all ranks have the same."""
        alone = self.trainer is None or self.trainer.world_size == 1
        default = os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32 if alone else 0)
        return int(self.resumed.get("seed", default))

    def state_dict(self) -> dict[str, int]:
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.current
        epoch, batches = self.trainer.current_epoch, progress.processed
        if batches >= self.trainer.num_training_batches:
            epoch, batches = epoch + 1, 0
        return {"seed": self.run_seed, "epoch": epoch, "batches": batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.resumed = state_dict
        vars(self).pop("run_seed", None)

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        """The data set of "train" or "val", whose samples went through `transform`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its data set")

    def report(self, check: LabelCheck, source: Path | str) -> None:
        """Raises what a reader of labels has found, or keeps it, where faults are gathered."""
        if self.faults is not None:
            self.faults += check.faults
            check.faults = []
        check.report(source)

    def dataset(self, split: str) -> Any:
        """The data set of "train" or "val", built once."""
        if split not in self.datasets:
            transform = self.train_transform if split == "train" else self.eval_transform
            self.datasets[split] = self.build_dataset(split, transform)
        return self.datasets[split]

    @staticmethod
    def splits(stage: str | None) -> tuple[str, ...]:
        return ("train", "val") if stage == "fit" else ("val",)

    def setup(self, stage: str) -> None:
        for split in self.splits(stage):
            self.dataset(split)

    def prepare_data(self) -> None:
        """Reads the headers of all images, once a machine; what is damaged is told in one go."""
        stage = self.trainer.state.fn if self.trainer else "fit"
        if not self.check_images or stage == "predict":
            return
        found, advice = [], ""
        for split in self.splits(stage):
            faults, damaged = self.find_faults(split)
            if faults:
                self.datasets.pop(split, None)  # which lacks what is at fault
            if split == "train" and damaged:
                if len(damaged) <= self.skip_damaged:
                    for fault in damaged:
                        log.warning("%s; is left out of training", fault)
                    damaged = []
                else:
                    limit = f"{len(damaged)} training images are damaged, but skip_damaged is {self.skip_damaged}"
                    advice = f"; --data.skip_damaged leaves some out, and says which ({limit})"
            found += faults + damaged
        if found:
            raise DataError(found, "data", advice)

    def find_faults(self, split: str, decode: bool = False) -> tuple[list[str], list[str]]:
        """All that is wrong with a split: faults of its labels, and damaged files.

        Args:
            split: "train" or "val".
            decode: whether to read the pixels, too.
        """
        faults: list[str] = []
        self.faults = faults
        try:
            dataset = self.dataset(split)
        except DataError as error:
            return faults + error.faults, []
        except (OSError, ValueError) as error:  # which leaves nothing to look at
            return [*faults, str(error)], []
        finally:
            self.faults = None
        damaged = (
            find_damaged_samples(dataset, self.num_workers, decode, split) if hasattr(dataset, "check_header") else []
        )
        return faults, damaged

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.seeded is not None and (count := len(self.seeded.left_out())):
            names = [self.seeded.dataset.name_of(index) for index in self.seeded.left_out()[:5]]
            told = ", ".join(names) + (", ..." if count > 5 else "")
            log.warning("%d of %d training images were damaged and left out: %s", count, len(self.seeded), told)

    def loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Over a data set, in order; `options` are further ones of DataLoader."""
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate_fn,
            **options,
        )

    def replicas_and_rank(self) -> tuple[int, int]:
        """Number of the processes that share the images, and which of them this is."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def drop_last(self) -> bool:
        """Whether to leave out a last, smaller training batch: only where a device has a whole one besides."""
        replicas, _ = self.replicas_and_rank()
        return self.whole_batches and len(self.datasets["train"]) // replicas >= self.batch_size  # type: ignore[arg-type]

    def order(self, epoch: int, start: int = 0) -> TrainingSampler:
        """Of the training images of this process; `start` of them were seen."""
        replicas, rank = self.replicas_and_rank()
        return TrainingSampler(self.datasets["train"], replicas, rank, self.run_seed, self.repeats, epoch, start)

    def names_of(self, epoch: int, batch_idx: int) -> list[str]:
        """What the images of a training batch are called: their files, where they have some."""
        dataset: Any = self.datasets["train"]
        keys = itertools.islice(self.order(epoch, batch_idx * self.batch_size), self.batch_size)
        return [dataset.name_of(index) for index, *_ in keys]

    def share(self, dataset: Any) -> RankSampler | None:
        """Of this process in evaluation or prediction; None where it is alone."""
        replicas, rank = self.replicas_and_rank()
        if replicas == 1:
            return None
        if len(dataset) < replicas:
            raise ValueError(f"there are {len(dataset)} images for {replicas} devices; each needs one: take fewer")
        return RankSampler(
            range(rank * len(dataset) // replicas, (rank + 1) * len(dataset) // replicas), replicas, rank
        )

    def train_dataloader(self) -> DataLoader[Any]:
        epoch, start = self.trainer.current_epoch if self.trainer else 0, 0
        if self.resumed.get("epoch", -1) >= epoch:  # Lightning asks before it knows where the run is
            epoch, start = self.resumed["epoch"], self.resumed["batches"] * self.batch_size
        order = self.order(epoch, start)
        self.seeded = self.seeded or SeededDataset(self.datasets["train"], self.skip_damaged)
        return self.loader(self.seeded, sampler=order, drop_last=self.drop_last())

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.datasets["val"], sampler=self.share(self.datasets["val"]))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


def float_image_transforms() -> list[Any]:
    """The last transforms of a sample: image in 0..1, float32; plain tensors."""
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]


def random_color_distortion(chance: float) -> Any:
    """Changes brightness, contrast, saturation and hue of so many of the images."""
    return v2.RandomApply([v2.RandomPhotometricDistort(p=1.0)], chance)


class DetectionDataModule(BaseDataModule):
    """Base of the detection data.

    A sample is an image (3, H, W), uint8, and a target: `boxes` (n, 4) as x1 y1 x2 y2 in pixels, `labels` (n,) from 0,
    `iscrowd` (n,), 1 for regions that evaluation ignores, `image_id`, and for masks `masks` (n, H, W), bool. Batches
    are two lists, images float32 in 0..1.

    Args:
        batch_size: images a step, of each device.
        num_workers: processes that load and augment, of each device.
        flip, distort, crop: chance for a training image to be mirrored, to change its colours, to be cut to a part
            that keeps some objects.
        annotation: "boxes", or "masks" besides; from the task, in `shunted-lit`.
        check_images, skip_damaged: as in `BaseDataModule`.
    """

    collate_fn: Callable[[list[Any]], Any] | None = staticmethod(collate)
    offers: tuple[str, ...] = ("boxes", "masks")

    def __init__(
        self,
        batch_size: int = 16,
        num_workers: int = 2,
        flip: float = 0.5,
        distort: float = 0.5,
        crop: float = 0.0,
        annotation: str | None = None,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(batch_size, num_workers, annotation, check_images, skip_damaged)
        self.train_transform = v2.Compose(
            [
                random_color_distortion(distort),
                v2.RandomApply([v2.RandomIoUCrop(min_scale=0.5)], crop),
                v2.RandomHorizontalFlip(flip),
                v2.SanitizeBoundingBoxes(labels_getter=entries_of_boxes),
                *float_image_transforms(),
            ]
        )
        self.eval_transform = v2.Compose(float_image_transforms())


def entries_of_boxes(sample: Any) -> list[Tensor]:
    """What loses an entry with each box that augmentation removes, besides masks."""
    return [sample[1]["labels"], sample[1]["iscrowd"]]


@dataclass
class Record:
    """An image on disk and its objects, as the readers of label formats give it."""

    path: Path
    image_id: int
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)  # x1 y1 x2 y2
    labels: list[int] = field(default_factory=list)
    size: tuple[int, int] | None = None  # width and height, where the annotations tell them
    crowd: list[bool] = field(default_factory=list)  # regions that evaluation ignores; none where empty
    segments: list[Segment] | None = None  # an outline for each box, where masks are wanted


class FolderDataset(Dataset[Sample]):
    """Images on disk, read when asked for.

    Args:
        records: an entry an image; boxes in pixels, or in fractions of the image where `relative`.
        relative: see there.
        transform: applied to (image, target).
        source: what to name where there is nothing.

    Raises:
        ValueError: no record at all, or none with an object; on access, an image that is missing, can't be read, has
            another size than its annotations say, or a box without area.
    """

    def __init__(self, records: list[Record], relative: bool, transform: Callable[..., Sample], source: Path | str):
        if not records:
            raise ValueError(f"{source}: no images; image files end in {', '.join(sorted(IMAGE_SUFFIXES))}")
        background = sum(not record.labels for record in records)
        if background == len(records):
            raise ValueError(f"{source}: none of the {background} images has an object; are the labels in their place?")
        if background:
            log.warning("%s: %d of %d images have no object", source, background, len(records))
        self.records, self.relative, self.transform = records, relative, transform

    def __len__(self) -> int:
        return len(self.records)

    def name_of(self, index: int) -> str:
        return str(self.records[index].path)

    def boxes(self, record: Record, width: int, height: int) -> Tensor:
        """The boxes (n, 4) of an image of this size, in pixels. Raises DamagedError where they don't fit."""
        if record.size not in (None, (width, height)):
            raise DamagedError(f"{record.path}: is {width} x {height}, but its annotations say {record.size}")
        boxes = torch.tensor(record.boxes, dtype=torch.float64).reshape(-1, 4)
        if self.relative:
            boxes *= torch.tensor([width, height, width, height])
        boxes = boxes.round(decimals=4)  # of a pixel: fractions and pixels then give the same boxes
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        if (boxes[:, 2:] <= boxes[:, :2]).any():
            raise DamagedError(
                f"{record.path}: a box has no area in this image of {width} x {height}: {boxes.tolist()}"
            )
        return boxes.float()

    def check_header(self, index: int) -> None:
        """Raises DamagedError where the image, by its header, can't be read, or the boxes are not of it."""
        record = self.records[index]
        size = read_size(record.path)
        if record.size in (None, size):
            self.boxes(record, *size)
        else:
            self.read(index)  # which is sure

    def __getitem__(self, index: int) -> Sample:
        return self.transform(*self.read(index))

    def record(self, index: int) -> tuple[Record, bytes | None]:
        """What is known of an image, and the content of its file where that is not on disk."""
        return self.records[index], None

    def read(self, index: int) -> Sample:
        """Image and target as they are on disk."""
        record, content = self.record(index)
        image = tv_tensors.Image(read_image(record.path, content))
        height, width = image.shape[-2:]
        boxes = self.boxes(record, width, height)
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
