"""The order of the samples in an epoch, and a seed for each sample; both depend only on seed, epoch and position."""

import logging
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from shunted_lit.data.image_io import DamagedError
from shunted_lit.utils.seeds import derive_seeds, seed_sample

log = logging.getLogger(__name__)

Key = tuple[int, int, int, int]  # index of a sample; and what seeds it: seed, epoch, position in the epoch


class TrainingSampler(DistributedSampler):
    """A new order of the training images in each epoch.

    It is a DistributedSampler so that Lightning does not replace it.

    Args:
        dataset: Data set; only its length is used, and its `shards`, where it has some.
        world_size: Number of processes that share an epoch.
        rank: Number of this process.
        seed: Seed of all orders; the same on all ranks.
        repeats: Repeated augmentation (Hoffer et al., arXiv 1901.09335): occurrences of an image in an epoch, which
            keeps its length. Each is augmented differently, on another rank; 1 for none.
        epoch: Epoch to begin with.
        start: Samples of this rank to skip in that epoch.
    """

    def __init__(
        self, dataset: Any, world_size: int, rank: int, *, seed: int, repeats: int = 1, epoch: int = 0, start: int = 0
    ):
        super().__init__(dataset, world_size, rank, seed=seed)
        self.repeats, self.epoch, self.start = repeats, epoch, start

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(derive_seeds(2, self.seed, self.epoch)[0])
        positions = torch.arange(self.total_size)  # the last ones repeat images, so that all ranks have equally many
        shards = getattr(self.dataset, "shards", None)
        if shards is None:
            order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            positions = positions[self.rank :: self.num_replicas]
        else:  # consecutive positions, so that a rank needs few of the shards
            order = shards.shuffle(generator)
            positions = positions[self.rank * self.num_samples :][: self.num_samples]
        positions = positions[self.start :]
        indices = order[positions // self.repeats % len(order)].tolist()
        if shards is not None:
            indices = shards.prefetch(indices)
        for index, position in zip(indices, positions.tolist(), strict=True):
            yield index, self.seed, self.epoch, position


class RankSampler(DistributedSampler):
    """The samples of one rank in evaluation or prediction, none of which another rank has.

    Args:
        indices: Samples of this rank.
        world_size: Number of processes.
        rank: Number of this process.
    """

    def __init__(self, indices: Sequence[int], world_size: int, rank: int):
        super().__init__(indices, world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class SeededDataset(Dataset[Any]):
    """A data set indexed by the keys of `TrainingSampler`, which seed each sample.

    Args:
        dataset: Data set that raises DamagedError for an image that cannot be read.
        max_skipped: Number of damaged images to skip with a warning; each is replaced by the next image.
    """

    def __init__(self, dataset: Any, max_skipped: int = 0):
        self.dataset, self.max_skipped = dataset, max_skipped
        # Shared by all workers.
        self.damaged = torch.zeros(len(dataset) if max_skipped else 0, dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Any:
        index, *seeds = key if isinstance(key, tuple) else (key,)  # Lightning's overfit_batches gives a plain index
        if seeds:
            seed_sample(*seeds)
        if not self.max_skipped:
            return self.dataset[index]
        for candidate in range(index, index + len(self)):
            candidate %= len(self)
            if not self.damaged[candidate]:
                try:
                    return self.dataset[candidate]
                except DamagedError as error:
                    self.skip(candidate, error)
        raise ValueError("All training images are damaged.")

    def skip(self, index: int, error: DamagedError) -> None:
        """Record a damaged image. Raise ValueError where there are more than `max_skipped`."""
        self.damaged[index] = True
        count = len(self.skipped())
        if count > self.max_skipped:
            raise ValueError(f"{error} {count} training images are damaged, but `skip_damaged` is {self.max_skipped}.")
        log.warning("Skipping a damaged training image (%d of at most %d): %s", count, self.max_skipped, error)

    def skipped(self) -> list[int]:
        """Return the indices of the damaged images."""
        return self.damaged.nonzero().flatten().tolist()


def ignore_signals_in_worker(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which all processes of a group receive, to the main process.

    A second SIGTERM ends the worker, so that one that hangs can be stopped.
    """

    def end_on_next_signal(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_on_next_signal)
