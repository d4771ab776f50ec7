"""Data in shards: tar files of about a thousand images each, on a disk or in an object store, read as they are needed.

The format is WebDataset's, so that other tools read the shards as well, and `index.json` besides, which says how many
images each of them has. They are read by that index rather than as a stream: so order and augmentation follow from
seed, epoch and place as for folders, whatever the number of workers, and a run goes on in mid-epoch.
"""

import contextlib
import json
import math
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import Dataset

from shunted_lit.data.base import DetectionDataModule, FolderDataset, Record, annotation_covers
from shunted_lit.data.classification import ClassificationDataModule
from shunted_lit.data.coco import MOST_PIXELS, is_side, is_whole
from shunted_lit.data.image_io import read_image
from shunted_lit.data.masks import find_mask_fault, is_number
from shunted_lit.data.validation import find_damaged_samples
from shunted_lit.utils.files import fingerprint

INDEX = "index.json"
VERSION = 1
CACHE = "~/.cache/shunted_lit"
TRIES = 3  # of a download


def is_url(place: str) -> bool:
    return "://" in place


class Shards:
    """The shards of a split, and the files of each of their images.

    Args:
        root: folder of the split, or its URL, of any kind that fsspec knows, such as s3://, gs:// or https://.
        cache: where a URL's shards are kept.
        cache_gb: gigabytes that they may take; the ones not used for longest make room. None for no bound.
        window: shards that a place of the epoch mixes.

    Raises:
        ValueError: there is no index, or it is of something else.
    """

    def __init__(self, root: str, cache: str | None = None, cache_gb: float | None = None, window: int = 16):
        self.root, self.cache_gb, self.window = root.rstrip("/"), cache_gb, window
        text = self.text_of_index()
        try:
            index = json.loads(text)
            if index["version"] != VERSION:
                raise ValueError(f"it is of version {index['version']}, but {VERSION} is read; install a newer release")
            shards = [(shard["name"], shard["bytes"], shard["samples"]) for shard in index["shards"]]
            classes, relative, self.annotation = index["classes"], index["relative"], str(index["annotation"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.root}/{INDEX}: is no index of shards ({error!r})") from error
        known = [isinstance(name, str) and bool(re.fullmatch(r"[\w-]+\.tar", name)) for name, *_ in shards]
        whole = [isinstance(number, int) and 0 < number < 2**40 for shard in shards for number in shard[1:]]
        if not shards or not all(known) or not all(whole) or len({name for name, *_ in shards}) < len(shards):
            raise ValueError(
                f"{self.root}/{INDEX}: needs shards, each with NAME.tar of its own, and bytes and samples above 0"
            )
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{self.root}/{INDEX}: classes are {str(classes)[:80]}, but a list of names is needed")
        self.classes, self.relative = classes, relative is True
        self.names, self.bytes = [name for name, *_ in shards], [size for _, size, _ in shards]
        self.counts = torch.tensor([count for *_, count in shards])
        self.ends = self.counts.cumsum(0).numpy()
        self.cache = Path(cache or CACHE).expanduser() / fingerprint(self.root.encode(), text)
        self.opened: OrderedDict[int, tuple[int, list[dict[str, tuple[int, int]]]]] = OrderedDict()
        most = max(self.bytes) * (window + 2) / 1e9
        if is_url(self.root) and cache_gb is not None and cache_gb < min(most, sum(self.bytes) / 1e9):
            raise ValueError(
                f"cache_gb is {cache_gb:g}, but {most:.2f} GB are in use at a time ({window + 2} shards of up to "
                f"{max(self.bytes) / 1e6:.0f} MB); give more, or a smaller window"
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": OrderedDict()}  # files belong to a process

    def place(self, shard: int) -> str:
        return f"{self.root}/{self.names[shard]}"

    def text_of_index(self) -> bytes:
        try:
            with fsspec.open(f"{self.root}/{INDEX}", "rb") as file:
                return file.read()
        except ImportError as error:  # of the package for this kind of URL
            raise ValueError(f"{self.root}: {error}") from error
        except Exception as error:  # each kind of store has its own
            raise ValueError(
                f"{self.root}/{INDEX}: can't be read ({error or type(error).__name__}); `shunted-lit shard` writes "
                "shards, and this file last"
            ) from error

    def faults(self) -> list[str]:
        """Shards that are missing, or not as long as they were when written; none where a store lists nothing."""
        try:
            files, folder = fsspec.core.url_to_fs(self.root)
            found = {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in files.ls(folder, detail=True)}
        except Exception:  # reading tells
            return []
        if INDEX not in found:  # a page that lists nothing, as of many web servers
            return []
        return [
            f"{self.place(i)}: "
            + (f"has {found[name]} bytes, but its index says {size}" if name in found else "missing")
            for i, (name, size) in enumerate(zip(self.names, self.bytes, strict=True))
            if found.get(name, -1) not in (None, size)
        ]

    def fetch(self, shard: int) -> Path:
        """The shard as a file of this machine, which a URL's is made first. Raises ValueError where it is missing."""
        if not is_url(self.root):
            return Path(self.place(shard))
        path = self.cache / self.names[shard]
        if not path.is_file():
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(f"{self.cache}: can't be made ({error.strerror}); name a folder by cache") from error
            with FileLock(path.with_suffix(".lock")):
                if not path.is_file():
                    with FileLock(self.cache.parent / "room.lock"):
                        self.make_room(self.bytes[shard])
                        path.with_suffix(".part").touch()
                    self.download(shard, path)
        return path

    def download(self, shard: int, path: Path) -> None:
        part = path.with_suffix(".part")
        for attempt in range(TRIES):
            try:
                files, place = fsspec.core.url_to_fs(self.place(shard))
                files.get_file(place, str(part))
                if (size := part.stat().st_size) != self.bytes[shard]:
                    raise ValueError(f"{size} bytes came, but its index says {self.bytes[shard]}")
                part.replace(path)
                return
            except Exception as error:  # each kind of store has its own
                if attempt + 1 == TRIES:
                    part.unlink(missing_ok=True)
                    raise ValueError(f"{self.place(shard)}: can't be read ({error or type(error).__name__})") from error
                time.sleep(2**attempt)

    def make_room(self, size: int) -> None:
        """For a shard, besides those that are on their way, in the cache of all data."""
        if self.cache_gb is None:
            return
        kept = sorted(self.cache.parent.glob("*/*.tar"), key=lambda path: path.stat().st_mtime)
        size += max(self.bytes) * len(list(self.cache.parent.glob("*/*.part")))
        while kept and sum(path.stat().st_size for path in kept) + size > self.cache_gb * 1e9:
            kept.pop(0).unlink()  # who reads it now still has it open

    def open(self, shard: int) -> tuple[int, list[dict[str, tuple[int, int]]]]:
        """File number of a shard, and for each of its images where its files are, by suffix: offset and length."""
        if shard in self.opened:
            self.opened.move_to_end(shard)
            return self.opened[shard]
        number = self.file(shard)
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        try:
            if (size := os.fstat(number).st_size) != self.bytes[shard]:
                raise ValueError(f"has {size} bytes, but its index says {self.bytes[shard]}")
            with os.fdopen(os.dup(number), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            if len(samples) != self.counts[shard]:
                raise ValueError(f"holds {len(samples)} images, but its index says {self.counts[shard]}")
        except (OSError, ValueError, tarfile.TarError) as error:
            os.close(number)
            raise ValueError(f"{self.place(shard)}: is damaged ({error}); write or copy it again") from error
        self.opened[shard] = (number, list(samples.values()))
        if len(self.opened) > self.window + 4:  # each keeps its space, also where it made room
            os.close(self.opened.popitem(last=False)[1][0])
        return self.opened[shard]

    def read(self, index: int, *names: str) -> tuple[bytes, list[Any]]:
        """An image, and of what is known of it the values of these names.

        Raises:
            ValueError: a shard that is missing or damaged, or of which this is.
        """
        shard = int(np.searchsorted(self.ends, index, side="right"))
        file, samples = self.open(shard)
        sample = samples[index - int(self.ends[shard]) + int(self.counts[shard])]
        try:
            known = json.loads(os.pread(file, sample["json"][1], sample["json"][0]))
            start, size = next(place for suffix, place in sample.items() if suffix not in ("json", "cls"))
            values = [known[name] for name in names]
            if fault := fault_of_known(known, len(self.classes), self.relative):
                raise ValueError(fault)
        except (AttributeError, KeyError, OverflowError, StopIteration, TypeError, ValueError) as error:
            raise ValueError(f"{self.place(shard)}: image {index} is damaged ({error!r}); write it again") from error
        return os.pread(file, size, start), values

    def file(self, shard: int) -> int:
        """Number of its open file, which then stays readable if it has to make room for others."""
        for _ in range(TRIES):
            path = self.fetch(shard)
            try:
                number = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # a URL's has just made room
            except OSError as error:
                raise ValueError(f"{self.place(shard)}: can't be read ({error.strerror})") from error
            if is_url(self.root):
                with contextlib.suppress(OSError):
                    os.utime(path)  # by which the cache knows what is in use
            return number
        raise ValueError(f"{self.place(shard)}: is missing; write or copy it again")

    def shuffled(self, generator: torch.Generator) -> Tensor:
        """All images in a new order, in which a place has images of `window` shards, and a shard is near itself."""
        row = torch.randperm(len(self.counts), generator=generator).argsort()
        places = row.repeat_interleave(self.counts) + self.window * torch.rand(len(self), generator=generator)
        return places.argsort()

    def coming(self, images: Sequence[int]) -> Iterator[int]:
        """The images, while the shards of those two shards ahead are fetched."""
        if not is_url(self.root):
            yield from images
            return
        shards = np.searchsorted(self.ends, np.asarray(images), side="right")
        firsts = iter(sorted(np.unique(shards, return_index=True)[1].tolist()))  # places where a shard is new
        ahead, first = 2 * int(self.counts.max()), next(firsts, None)
        with ThreadPoolExecutor(2) as pool:
            try:
                for place, image in enumerate(images):
                    while first is not None and first <= place + ahead:
                        pool.submit(self.fetch, int(shards[first]))  # who needs it tells what went wrong
                        first = next(firsts, None)
                    yield image
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def fault_of_known(known: Any, classes: int, relative: bool) -> str | None:
    """What is wrong with what a shard, maybe of a stranger's, tells of an image; None where nothing is."""
    labels = known["labels"] if "boxes" in known else [known["label"]]
    if not isinstance(known["name"], str) or not isinstance(labels, list):
        return "name and labels are text and a list, if they are right"
    if not all(is_whole(label) and 0 <= label < classes for label in labels):
        return f"its classes are {labels[:9]}, but there are {classes}"
    if "boxes" not in known:
        return None
    boxes, crowd, size, segments = known["boxes"], known["crowd"], known["size"], known["segments"]
    if not all(len(box) == 4 and all(map(is_number, box)) for box in boxes):
        return "its boxes are not four finite numbers each"
    if len(boxes) != len(labels) or len(crowd) not in (0, len(labels)) or not is_whole(known["image_id"]):
        return f"it has {len(labels)} classes, {len(boxes)} boxes and {len(crowd)} crowd flags"
    if size is not None and not (len(size) == 2 and all(map(is_side, size)) and math.prod(size) <= MOST_PIXELS):
        return f"its size is {size}"
    if segments is not None:
        if len(segments) != len(labels):
            return f"it has {len(labels)} classes and {len(segments)} masks"
        width, height = (1, 1) if relative else size
        slack = 1e-3 if relative else 1.0
        return next(
            (f"a mask {fault}" for mask in segments if (fault := find_mask_fault(mask, height, width, slack))), None
        )
    return None


class ShardedDataset:
    """What both data sets below share: their images are those of `shards`."""

    shards: Shards

    def __len__(self) -> int:
        return len(self.shards)

    def name_of(self, index: int) -> str:
        return self.shards.read(index, "name")[1][0]


class ClassificationShards(ShardedDataset, Dataset[Any]):
    """Images of shards and their classes."""

    def __init__(self, shards: Shards, transform: Callable[..., Any]):
        self.shards, self.transform = shards, transform

    def read(self, index: int) -> tuple[Any, int]:
        content, (name, label) = self.shards.read(index, "name", "label")
        return read_image(name, content), label

    def __getitem__(self, index: int) -> Any:
        image, label = self.read(index)
        return self.transform(image), label


class DetectionShards(ShardedDataset, FolderDataset):
    """Images of shards and their objects."""

    def __init__(self, shards: Shards, masks: bool, transform: Callable[..., Any]):
        self.shards, self.masks, self.transform = shards, masks, transform
        self.relative = shards.relative

    def record(self, index: int) -> tuple[Record, bytes | None]:
        names = ("name", "image_id", "boxes", "labels", "size", "crowd", "segments")
        content, (name, image_id, boxes, labels, size, crowd, segments) = self.shards.read(index, *names)
        size = None if size is None else tuple(size)
        return Record(Path(name), image_id, boxes, labels, size, crowd, segments if self.masks else None), content


class ShardsMixin:
    """What both data modules below share: two splits of shards."""

    def open_shards(self, root: str, cache: str | None, cache_gb: float | None, window: int, annotation: str) -> None:
        if window < 1 or (cache_gb is not None and cache_gb <= 0):
            raise ValueError(f"window is {window} and cache_gb {cache_gb}; 1 or more, and above 0, are needed")
        self.shards = {split: Shards(f"{root}/{split}", cache, cache_gb, window) for split in ("train", "val")}
        train, val = self.shards["train"], self.shards["val"]
        if train.classes != val.classes:
            raise ValueError(f"{val.root} has other classes than {train.root}: {val.classes} against {train.classes}")
        for shards in self.shards.values():
            if not annotation_covers(shards.annotation, annotation):
                raise ValueError(
                    f"{shards.root} has {shards.annotation}, but {annotation} are wanted; choose other data"
                )
        self.class_names = train.classes

    def find_faults(self: Any, split: str, decode: bool = False) -> tuple[list[str], list[str]]:
        """Shards that are missing or not whole; with `decode`, images that can't be read as well."""
        faults = self.shards[split].faults()
        whole = decode and not faults
        return faults, find_damaged_samples(self.dataset(split), self.num_workers, True, split) if whole else []


class ClassificationShardsDataModule(ShardsMixin, ClassificationDataModule):
    """Labelled images in shards, as `shunted-lit shard --data ImageFolderDataModule` writes them.

    Args:
        root: folder, or URL, that holds `train` and `val`.
        cache: folder of this machine for shards of a URL; null for ~/.cache/shunted_lit.
        cache_gb: gigabytes that it may take; null for no bound.
        window: shards whose images a place of the training order mixes.
        keywords: further ones of `ClassificationDataModule`.

    Raises:
        ValueError: shards that are missing, damaged, of other data or of other classes, naming them.
    """

    def __init__(
        self, root: str, cache: str | None = None, cache_gb: float | None = None, window: int = 16, **keywords: Any
    ):
        super().__init__(**keywords)
        self.open_shards(root, cache, cache_gb, window, "class")

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return ClassificationShards(self.shards[split], transform)


class DetectionShardsDataModule(ShardsMixin, DetectionDataModule):
    """Images and objects in shards, as `shunted-lit shard --data CocoDataModule`, or YoloDataModule, writes them.

    Args:
        root, cache, cache_gb, window: as in `ClassificationShardsDataModule`.
        keywords: further ones of `DetectionDataModule`.

    Raises:
        ValueError: as there.
    """

    def __init__(
        self, root: str, cache: str | None = None, cache_gb: float | None = None, window: int = 16, **keywords: Any
    ):
        super().__init__(**keywords)
        self.save_hyperparameters(logger=False)
        self.open_shards(root, cache, cache_gb, window, self.annotation)

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return DetectionShards(self.shards[split], self.annotation == "masks", transform)
