"""The order of an epoch, and random numbers for each sample: both of seed, epoch and place alone."""

import logging
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from shunted_lit.data.image_io import DamagedError
from shunted_lit.utils.seeds import derive_seeds, seed_sample

log = logging.getLogger(__name__)

Key = tuple[int, int, int, int]  # index, and what its random numbers follow from: seed, epoch, place in the epoch


class TrainingSampler(DistributedSampler):
    """A new order of the images in each epoch; being a DistributedSampler, Lightning leaves it in its place.

    Args:
        dataset: of which only the length is asked for.
        replicas: processes that share an epoch.
        rank: number of this one.
        seed: of all orders; the same in all processes.
        repeats: times that an image is in an epoch, each time augmented anew and by another process, while the epoch
            stays as long: repeated augmentation (Hoffer et al., arXiv 1901.09335).
        epoch, start: where to begin: samples of this process that were seen in that epoch.
    """

    def __init__(
        self, dataset: Any, replicas: int, rank: int, seed: int, repeats: int = 1, epoch: int = 0, start: int = 0
    ):
        super().__init__(dataset, replicas, rank, seed=seed)
        self.repeats, self.epoch, self.start = repeats, epoch, start

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.start = epoch, 0

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(derive_seeds(2, self.seed, self.epoch)[0])
        places = torch.arange(self.total_size)  # the last ones begin anew, so that all processes have as many
        shards = getattr(self.dataset, "shards", None)
        if shards is None:
            images = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
            own = places[self.rank :: self.num_replicas]
        else:  # a stretch each, so that a process needs few of the shards
            images = shards.shuffled(generator)
            own = places[self.rank * self.num_samples :][: self.num_samples]
        own = own[self.start :]
        chosen = images[own // self.repeats % len(images)].tolist()
        for image, place in zip(shards.coming(chosen) if shards else chosen, own.tolist(), strict=True):
            yield image, self.seed, self.epoch, place


class RankSampler(DistributedSampler):
    """Images of one of several processes that evaluate together: each image is one's, and none is there twice.

    Args:
        indices: of these images.
        replicas, rank: as in `Order`.
    """

    def __init__(self, indices: Sequence[int], replicas: int, rank: int):
        super().__init__(indices, replicas, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = indices

    def __iter__(self) -> Iterator[Any]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class SeededDataset(Dataset[Any]):
    """A data set by the keys of `Order`: random numbers of a sample are its own, whoever loads it, and when.

    Args:
        dataset: raises DamagedError for an image that can't be read.
        limit: so many of these are left out, and told; the next one takes their place.
    """

    def __init__(self, dataset: Any, limit: int = 0):
        self.dataset, self.limit = dataset, limit
        self.damaged = torch.zeros(len(dataset) if limit else 0, dtype=torch.bool).share_memory_()  # of all workers

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | int) -> Any:
        index, *rest = key if isinstance(key, tuple) else (key,)  # a plain one from Lightning's overfit_batches
        if rest:
            seed_sample(*rest)
        if not self.limit:
            return self.dataset[index]
        for place in range(index, index + len(self)):
            index = place % len(self)
            if not self.damaged[index]:
                try:
                    return self.dataset[index]
                except DamagedError as error:
                    self.leave_out(index, error)
        raise ValueError("all training images are damaged")

    def leave_out(self, index: int, error: DamagedError) -> None:
        """Counts an image that is damaged. Raises ValueError where the limit is reached."""
        self.damaged[index] = True
        count = len(self.left_out())
        if count > self.limit:
            raise ValueError(f"{error}; {count} training images are damaged, but skip_damaged is {self.limit}")
        log.warning("%s; is left out, as %d of up to %d", error, count, self.limit)

    def left_out(self) -> list[int]:
        """Images that turned out to be damaged."""
        return self.damaged.nonzero().flatten().tolist()


def ignore_signals_in_worker(worker: int) -> None:
    """For a data worker: Ctrl-C and SIGTERM, which come to all processes of a group, are the main process's to heed.

    A second SIGTERM ends it: that is how a worker that hangs is ended.
    """

    def once(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)
