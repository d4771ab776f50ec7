"""Base of the data modules: loaders, order of the training images, and reports of damaged data."""

import functools
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from shunted_lit.data.sampling import RankSampler, SeededDataset, TrainingSampler, ignore_signals_in_worker
from shunted_lit.data.validation import DataError, LabelCheck, find_damaged_samples
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.distributed import rank, world_size

log = logging.getLogger(__name__)


def annotation_covers(given: str, wanted: str) -> bool:
    """Return whether data with the annotation `given` suit a task that learns from `wanted`: masks include boxes."""
    return given == wanted or (given, wanted) == ("masks", "boxes")


def collate(samples: list[tuple[Tensor, Any]]) -> tuple[list[Tensor], list[Any]]:
    """Return images and targets as two lists, since images differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def choose_num_workers(samples: int, processes: int = 1) -> int:
    """Return a number of worker processes that suits the processors available to this process.

    Args:
        samples: Number of samples to load; below 64, starting workers takes longer than loading.
        processes: Number of processes that load data on this machine.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    processors = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(processors // processes, 8) if samples >= 64 else 0


class BaseDataModule(LightningDataModule):
    """Base of the data modules.

    A subclass sets `class_names`, `train_transform` and `eval_transform`, and implements `build_dataset`. All
    arguments of its constructor are saved as hyperparameters.

    Order and augmentation of the training images depend on the run's seed, the epoch and the position in the epoch,
    not on the number of workers. A checkpoint stores that position, so that a run resumes in mid-epoch.

    `annotation` states what comes with an image: "class", "boxes", "masks" (a box and a mask for each object), "map" (a
    class for each pixel) or "none". Tasks state in the same words what they learn from. `offers` lists what a data
    module can provide; the first is its default.

    A data set of files has `check_header(index)`, which reads headers, and `read(index)`, which reads a sample; both
    raise ValueError for a damaged file.

    Args:
        batch_size: Batch size per device.
        num_workers: Number of processes per device that load and augment images; null: the available processors divided
            by the devices of this machine, at most 8, and 0 for fewer than 64 images.
        check_images: Whether to read the headers of all files before training, to report damaged ones at the start;
            generated scenes have no files.
        skip_damaged: Number of damaged training images to skip with a warning; each is replaced by the next image. One
            more, or a damaged image in evaluation, is an error.
    """

    class_names: list[str]
    train_transform: Callable[..., Any]
    eval_transform: Callable[..., Any]
    collate_fn: Callable[[list[Any]], Any] | None = None
    offers: tuple[str, ...]
    repeats = 1  # occurrences of a training image in an epoch
    drop_incomplete = False  # skip a last, smaller training batch, as BatchNorm and mixup may require

    def __init__(
        self,
        *,
        batch_size: PositiveInt = 16,
        num_workers: NonNegativeInt | None = None,
        check_images: bool = True,
        skip_damaged: NonNegativeInt = 0,
    ):
        super().__init__()
        # Loggers refuse a name that the task has with another value, such as `short_side`; config.yaml has all of them.
        self.save_hyperparameters(logger=False)
        kind = type(self)
        if kind.setup is BaseDataModule.setup and kind.build_dataset is BaseDataModule.build_dataset:
            raise ValueError(f"{kind.__name__} is a base class; choose a data module that reads data with `--data`.")
        check_minimum(1, batch_size=batch_size)
        check_minimum(0, num_workers=num_workers, skip_damaged=skip_damaged)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.check_images, self.skip_damaged = check_images, skip_damaged
        self.annotation = self.offers[0]
        self.datasets: dict[str, Any] = {}
        self.seeded: SeededDataset | None = None
        self.label_faults: list[str] | None = None  # collected here instead of raised, unless None
        self.resumed: dict[str, int] = {}  # seed, epoch and batches of a checkpoint

    def choose_annotation(self, annotation: str | None) -> None:
        """Set `annotation`; None selects the first of `offers`. Raise ValueError if `offers` lacks it."""
        if annotation is not None and annotation not in self.offers:
            raise ValueError(
                f"`annotation` of {type(self).__name__} must be {' or '.join(self.offers)}, got {annotation!r}; choose "
                "other data, or another task or detector."
            )
        self.annotation = annotation or self.offers[0]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @functools.cached_property
    def run_seed(self) -> int:
        """Seed of the checkpoint, else of Lightning, else PyTorch's initial one; the same on all ranks."""
        single = self.world_size_and_rank()[0] == 1
        default = os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32 if single else 0)
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
        """Build the data set of "train" or "val", whose samples pass through `transform`."""
        raise NotImplementedError(f"{type(self).__name__} must implement `build_dataset`.")

    def report(self, check: LabelCheck, source: Path | str) -> None:
        """Raise the faults that a label reader has recorded, or collect them during `find_faults`."""
        if self.label_faults is not None:
            self.label_faults += check.faults
            check.faults = []
        check.report(source)

    def dataset(self, split: str) -> Any:
        """Return the data set of "train" or "val", built once."""
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
        """Check labels and image headers once per machine. Raise one DataError for all damaged data."""
        stage = self.trainer.state.fn if self.trainer else "fit"
        if not self.check_images or stage == "predict":
            return
        faults, advice = [], ""
        for split in self.splits(stage):
            label_faults, damaged = self.find_faults(split)
            if label_faults:
                self.datasets.pop(split, None)  # it lacks the entries with faults
            if split == "train" and damaged:
                if len(damaged) <= self.skip_damaged:
                    for message in damaged:
                        log.warning("Skipping a damaged training image: %s", message)
                    damaged = []
                else:
                    advice = (
                        f"{len(damaged)} training images are damaged, but `skip_damaged` is {self.skip_damaged}; raise "
                        "--data.skip_damaged to skip them with a warning."
                    )
            faults += label_faults + damaged
        if faults:
            raise DataError(list(dict.fromkeys(faults)), "data", advice)  # splits may share label files

    def find_faults(self, split: str, decode: bool = False) -> tuple[list[str], list[str]]:
        """Return the faults in the labels of a split, and its damaged files.

        Args:
            split: "train" or "val".
            decode: Whether to read pixels as well as headers.
        """
        label_faults: list[str] = []
        self.label_faults = label_faults
        try:
            dataset = self.dataset(split)
        except DataError as error:
            return label_faults + error.faults, []
        except (OSError, ValueError) as error:  # there is no data set to check
            return [*label_faults, str(error)], []
        finally:
            self.label_faults = None
        if not hasattr(dataset, "check_header"):
            return label_faults, []
        return label_faults, find_damaged_samples(dataset, self.num_workers_for(dataset), decode, split)

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self.seeded is not None and (skipped := self.seeded.skipped()):
            names = ", ".join(self.seeded.dataset.name_of(index) for index in skipped[:5])
            names += ", ..." if len(skipped) > 5 else ""
            log.warning("%d of %d training images were damaged and skipped: %s", len(skipped), len(self.seeded), names)

    def num_workers_for(self, dataset: Any) -> int:
        """Return the number of worker processes that load a data set on this device."""
        if self.num_workers is not None:
            return self.num_workers
        return choose_num_workers(len(dataset), self.trainer.num_devices if self.trainer else 1)

    def build_loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        """Build a loader that reads a data set in order; `options` are passed to DataLoader."""
        num_workers = self.num_workers_for(dataset)
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=torch.cuda.is_available(),
            collate_fn=self.collate_fn,
            **options,
        )

    def world_size_and_rank(self) -> tuple[int, int]:
        if self.trainer:
            return self.trainer.world_size, self.trainer.global_rank
        return world_size(), rank()  # as in Lightning Fabric

    def training_sampler(self, epoch: int, start: int = 0) -> TrainingSampler:
        """Return the order of this rank's training images; the first `start` of them were seen."""
        ranks, own_rank = self.world_size_and_rank()
        return TrainingSampler(
            self.datasets["train"], ranks, own_rank, seed=self.run_seed, repeats=self.repeats, epoch=epoch, start=start
        )

    def evaluation_sampler(self, dataset: Any) -> RankSampler | None:
        """Return this rank's share of a data set, consecutive samples; None for a single process."""
        ranks, own_rank = self.world_size_and_rank()
        count = len(dataset)
        if ranks == 1:
            return None
        if count < ranks:
            raise ValueError(f"{ranks} devices need as many images, got {count}; use fewer devices.")
        return RankSampler(range(own_rank * count // ranks, (own_rank + 1) * count // ranks), ranks, own_rank)

    def names_of(self, epoch: int, batch_idx: int) -> list[str]:
        """Return the names of the images of a training batch, file names where the images are files."""
        dataset: Any = self.datasets["train"]
        keys = itertools.islice(self.training_sampler(epoch, batch_idx * self.batch_size), self.batch_size)
        return [dataset.name_of(index) for index, *_ in keys]

    def train_dataloader(self) -> DataLoader[Any]:
        epoch, start = self.trainer.current_epoch if self.trainer else 0, 0
        if self.resumed.get("epoch", -1) >= epoch:  # Lightning asks before it has restored the epoch
            epoch, start = self.resumed["epoch"], self.resumed["batches"] * self.batch_size
        dataset = self.datasets["train"]
        self.seeded = self.seeded or SeededDataset(dataset, self.skip_damaged)
        has_full_batch = len(dataset) // self.world_size_and_rank()[0] >= self.batch_size
        return self.build_loader(
            self.seeded, sampler=self.training_sampler(epoch, start), drop_last=self.drop_incomplete and has_full_batch
        )

    def val_dataloader(self) -> DataLoader[Any]:
        return self.build_loader(self.datasets["val"], sampler=self.evaluation_sampler(self.datasets["val"]))

    def test_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Any]:
        return self.val_dataloader()


def float_image_transforms() -> list[Any]:
    """Return the last transforms of a sample: the image becomes float32 in 0..1, all become plain tensors."""
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.ToPureTensor()]


def random_color_distortion(probability: float) -> Any:
    """Return a transform that randomly changes brightness, contrast, saturation and hue of an image."""
    return v2.RandomApply([v2.RandomPhotometricDistort(p=1.0)], probability)
