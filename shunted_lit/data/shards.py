"""Data in shards: tar files of about a thousand images each, on a disk or in an object store.

The format is WebDataset's, so that other tools read the shards as well, with an `index.json` that holds the number of
images in each. Images are read by that index instead of as a stream. Order and augmentation therefore depend on seed,
epoch and position as for folders, for any number of workers, and a run resumes in mid-epoch.
"""

import contextlib
import json
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from filelock import FileLock
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor
from torch.utils.data import Dataset

from shunted_lit.data.base import BaseDataModule, annotation_covers
from shunted_lit.data.classification import ClassificationDataModule
from shunted_lit.data.coco import is_size
from shunted_lit.data.detection import DetectionDataModule, FolderDataset, Record
from shunted_lit.data.image_io import read_image
from shunted_lit.data.masks import find_mask_fault
from shunted_lit.data.validation import find_damaged_samples, find_repeated, is_integer, is_number
from shunted_lit.utils.checks import check_minimum, check_positive
from shunted_lit.utils.files import fingerprint

INDEX = "index.json"
VERSION = 1
CACHE = "~/.cache/shunted_lit"
ATTEMPTS = 3  # of a download
MAX_SIZE = 2**40  # bytes or images of a shard

FilePosition = tuple[int, int]  # offset and length in a shard


def is_url(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class ShardIndex:
    """Content of an `index.json`."""

    names: list[str]  # file name of each shard
    sizes: list[int]  # size of each shard in bytes
    counts: list[int]  # number of images in each shard
    classes: list[str]
    annotation: str  # what comes with an image, as in `BaseDataModule`
    relative: bool  # whether boxes are in fractions of the image instead of pixels

    @classmethod
    def parse(cls, text: bytes, source: str) -> "ShardIndex":
        """Parse an index. Raise ValueError, naming `source`, where it is not one, or of another version."""
        try:
            content = json.loads(text)
            if content["version"] != VERSION:
                raise ValueError(f"version must be {VERSION}, got {content['version']}; install a newer release")
            shards = [(shard["name"], shard["bytes"], shard["samples"]) for shard in content["shards"]]
            classes, annotation, relative = content["classes"], str(content["annotation"]), content["relative"] is True
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source}: not an index of shards ({error!r}).") from error
        names, sizes, counts = ([shard[i] for shard in shards] for i in range(3))
        if not (
            names
            and all(isinstance(name, str) and re.fullmatch(r"[\w-]+\.tar", name) for name in names)
            and not find_repeated(names)
            and all(isinstance(number, int) and 0 < number < MAX_SIZE for number in sizes + counts)
        ):
            raise ValueError(f"{source}: needs shards, each with its own NAME.tar, and bytes and samples above 0.")
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ValueError(f"{source}: classes must be a list of names, got {str(classes)[:80]}.")
        return cls(names, sizes, counts, classes, annotation, relative)


class Shards:
    """The images of a split, in shards that are fetched and opened as they are needed.

    Args:
        root: Folder of the split, or its URL, of any kind that fsspec supports, such as s3://, gs:// or https://.
        cache: Folder for the shards of a URL; None for ~/.cache/shunted_lit.
        cache_gb: Largest size of the cache in gigabytes, kept by deleting the least recently used shards; None for any.
        window: Number of shards whose images are mixed at a position of the training order.

    Raises:
        ValueError: The index is missing or damaged, or `cache_gb` is too small for `window`.
    """

    def __init__(self, root: str, *, cache: str | None = None, cache_gb: float | None = None, window: int = 16):
        self.root, self.cache_gb, self.window = root.rstrip("/"), cache_gb, window
        text = self.read_index()
        self.index = ShardIndex.parse(text, f"{self.root}/{INDEX}")
        self.counts = torch.tensor(self.index.counts)
        self.ends = self.counts.cumsum(0).numpy()
        self.cache = Path(cache or CACHE).expanduser() / fingerprint(self.root.encode(), text)
        # The most recently used shards: file descriptor, and for each image the positions of its files by suffix.
        self.opened: OrderedDict[int, tuple[int, list[dict[str, FilePosition]]]] = OrderedDict()
        largest = max(self.index.sizes)
        needed = min(largest * (window + 2), sum(self.index.sizes)) / 1e9
        if is_url(self.root) and cache_gb is not None and cache_gb < needed:
            raise ValueError(
                f"`cache_gb` must be at least {needed:.2g}, got {cache_gb:g}: {window + 2} shards of up to "
                f"{largest / 1e6:.0f} MB are in use at a time; raise it, or lower `window`."
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": OrderedDict()}  # file descriptors belong to a process

    def path(self, shard: int) -> str:
        return f"{self.root}/{self.index.names[shard]}"

    def read_index(self) -> bytes:
        try:
            with fsspec.open(f"{self.root}/{INDEX}", "rb") as file:
                return file.read()
        except ImportError as error:  # the package for this kind of URL
            raise ValueError(f"{self.root}: {error}") from error
        except Exception as error:  # each kind of store has its own
            raise ValueError(
                f"{self.root}/{INDEX}: cannot be read ({error or type(error).__name__}); `shunted-lit shard` writes "
                "shards, and this file last."
            ) from error

    def find_faults(self) -> list[str]:
        """Return a message for each shard that is missing or has another size than in the index.

        The list is empty for a store that does not list its files.
        """
        try:
            files, folder = fsspec.core.url_to_fs(self.root)
            sizes = {entry["name"].rsplit("/", 1)[-1]: entry.get("size") for entry in files.ls(folder, detail=True)}
        except Exception:  # reading reports it
            return []
        if INDEX not in sizes:  # a page that lists no files, as of many web servers
            return []
        faults = []
        for shard, (name, size) in enumerate(zip(self.index.names, self.index.sizes, strict=True)):
            if name not in sizes:
                faults.append(f"{self.path(shard)}: missing.")
            elif sizes[name] not in (None, size):
                faults.append(f"{self.path(shard)}: has {sizes[name]} bytes, but its index states {size}.")
        return faults

    def fetch(self, shard: int) -> Path:
        """Return the local file of a shard, downloaded once per machine from a URL."""
        if not is_url(self.root):
            return Path(self.path(shard))
        file = self.cache / self.index.names[shard]
        if not file.is_file():
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"{self.cache}: cannot be created ({error.strerror}); choose another folder for `cache`."
                ) from error
            with FileLock(file.with_suffix(".lock")):
                if not file.is_file():
                    with FileLock(self.cache.parent / "room.lock"):
                        self.make_room(self.index.sizes[shard])
                        file.with_suffix(".part").touch()
                    self.download(shard, file)
        return file

    def download(self, shard: int, file: Path) -> None:
        part = file.with_suffix(".part")
        for attempt in range(ATTEMPTS):
            try:
                files, path = fsspec.core.url_to_fs(self.path(shard))
                files.get_file(path, str(part))
                if (size := part.stat().st_size) != self.index.sizes[shard]:
                    raise ValueError(f"received {size} bytes, but its index states {self.index.sizes[shard]}")
                part.replace(file)
                return
            except Exception as error:  # each kind of store has its own
                if attempt + 1 == ATTEMPTS:
                    part.unlink(missing_ok=True)
                    raise ValueError(
                        f"{self.path(shard)}: cannot be read ({error or type(error).__name__})."
                    ) from error
                time.sleep(2**attempt)

    def make_room(self, size: int) -> None:
        """Delete the least recently used shards of all data, until a new one and all current downloads fit."""
        if self.cache_gb is None:
            return
        # Downloads are counted first: one that ends meanwhile is counted twice rather than not at all.
        size += max(self.index.sizes) * len(list(self.cache.parent.glob("*/*.part")))
        kept = sorted(self.cache.parent.glob("*/*.tar"), key=lambda path: path.stat().st_mtime)
        while kept and sum(path.stat().st_size for path in kept) + size > self.cache_gb * 1e9:
            kept.pop(0).unlink()  # a process that reads it still has it open

    def open_file(self, shard: int) -> int:
        """Return a file descriptor of a shard; it stays readable when the file is deleted to make room."""
        for _ in range(ATTEMPTS):
            path = self.fetch(shard)
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # deleted just now to make room
            except OSError as error:
                raise ValueError(f"{self.path(shard)}: cannot be read ({error.strerror}).") from error
            if is_url(self.root):
                with contextlib.suppress(OSError):
                    os.utime(path)  # marks it as recently used
            return descriptor
        raise ValueError(f"{self.path(shard)}: missing; write or copy it again.")

    def open(self, shard: int) -> tuple[int, list[dict[str, FilePosition]]]:
        """Return a shard's file descriptor, and for each of its images the positions of its files by suffix."""
        if shard in self.opened:
            self.opened.move_to_end(shard)
            return self.opened[shard]
        descriptor = self.open_file(shard)
        samples: dict[str, dict[str, FilePosition]] = {}
        try:
            if (size := os.fstat(descriptor).st_size) != self.index.sizes[shard]:
                raise ValueError(f"has {size} bytes, but its index states {self.index.sizes[shard]}")
            with os.fdopen(os.dup(descriptor), "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    key, _, suffix = member.name.partition(".")
                    samples.setdefault(key, {})[suffix] = (member.offset_data, member.size)
            if len(samples) != self.index.counts[shard]:
                raise ValueError(f"has {len(samples)} images, but its index states {self.index.counts[shard]}")
        except (OSError, ValueError, tarfile.TarError) as error:
            os.close(descriptor)
            raise ValueError(f"{self.path(shard)}: damaged ({error}); write or copy it again.") from error
        self.opened[shard] = (descriptor, list(samples.values()))
        if len(self.opened) > self.window + 4:  # an open file keeps its disk space, even when deleted
            os.close(self.opened.popitem(last=False)[1][0])
        return self.opened[shard]

    def find_shard(self, indices: Any) -> np.ndarray:
        """Return the shard of an image, or of each of several."""
        return np.searchsorted(self.ends, indices, side="right")

    def read(self, index: int, *names: str) -> tuple[bytes, list[Any]]:
        """Return the content of an image file, and the values with these names from its JSON entry.

        Raises:
            ValueError: The shard is missing or damaged, or the entry is.
        """
        shard = int(self.find_shard(index))
        descriptor, samples = self.open(shard)
        sample = samples[index - int(self.ends[shard]) + self.index.counts[shard]]
        try:
            offset, size = sample["json"]
            entry = json.loads(os.pread(descriptor, size, offset))
            offset, size = next(position for suffix, position in sample.items() if suffix not in ("json", "cls"))
            values = [entry[name] for name in names]
            if fault := find_entry_fault(entry, len(self.index.classes), self.index.relative):
                raise ValueError(fault)
        except (AttributeError, KeyError, OverflowError, StopIteration, TypeError, ValueError) as error:
            raise ValueError(f"{self.path(shard)}: image {index} is damaged ({error!r}); write it again.") from error
        return os.pread(descriptor, size, offset), values

    def shuffle(self, generator: torch.Generator) -> Tensor:
        """Return all image indices in random order, such that consecutive images come from about `window` shards."""
        rank = torch.randperm(len(self.counts), generator=generator).argsort()
        places = rank.repeat_interleave(self.counts) + self.window * torch.rand(len(self), generator=generator)
        return places.argsort()

    def prefetch(self, images: Sequence[int]) -> Iterator[int]:
        """Yield the images, while the shards of a URL are fetched two shards ahead."""
        if not is_url(self.root):
            yield from images
            return
        shards = self.find_shard(np.asarray(images))
        firsts = iter(sorted(np.unique(shards, return_index=True)[1].tolist()))  # positions where a shard is new
        ahead, first = 2 * max(self.index.counts), next(firsts, None)
        with ThreadPoolExecutor(2) as pool:
            try:
                for position, image in enumerate(images):
                    while first is not None and first <= position + ahead:
                        pool.submit(self.fetch, int(shards[first]))  # errors are raised where the shard is read
                        first = next(firsts, None)
                    yield image
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


def find_entry_fault(entry: Any, num_classes: int, relative: bool) -> str | None:
    """Return what is wrong with an image's JSON entry in a shard, which may be untrusted; None where nothing is.

    An entry of a quite different form raises one of the errors that `Shards.read` handles.
    """
    labels = entry["labels"] if "boxes" in entry else [entry["label"]]
    if not isinstance(entry["name"], str) or not isinstance(labels, list):
        return "name must be text, and labels a list"
    if not all(is_integer(label) and 0 <= label < num_classes for label in labels):
        return f"its classes must be 0 to {num_classes - 1}, got {labels[:9]}"
    if "boxes" not in entry:
        return None
    boxes, crowd, size, segments = entry["boxes"], entry["crowd"], entry["size"], entry["segments"]
    if not all(len(box) == 4 and all(map(is_number, box)) for box in boxes):
        return "each box must be four finite numbers"
    if len(boxes) != len(labels) or len(crowd) not in (0, len(labels)) or not is_integer(entry["image_id"]):
        return f"it has {len(labels)} classes, {len(boxes)} boxes and {len(crowd)} crowd flags"
    if size is not None and not (len(size) == 2 and is_size(*size)):
        return f"its size is {size}"
    if segments is None:
        return None
    if len(segments) != len(labels):
        return f"it has {len(labels)} classes and {len(segments)} masks"
    width, height = (1, 1) if relative else size
    faults = (find_mask_fault(segment, height, width, slack=1e-3 if relative else 1.0) for segment in segments)
    return next((f"a mask {fault}" for fault in faults if fault), None)


class ClassificationShards(Dataset[Any]):
    """Images of shards and their classes."""

    def __init__(self, shards: Shards, transform: Callable[..., Any]):
        self.shards, self.transform = shards, transform

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Any:
        image, label = self.read(index)
        return self.transform(image), label

    def name_of(self, index: int) -> str:
        return self.shards.read(index, "name")[1][0]

    def read(self, index: int) -> tuple[Any, int]:
        content, (name, label) = self.shards.read(index, "name", "label")
        return read_image(name, content), label


class DetectionShards(FolderDataset):
    """Images of shards and their objects."""

    def __init__(self, shards: Shards, *, masks: bool, transform: Callable[..., Any]):
        self.shards, self.masks, self.transform = shards, masks, transform
        self.relative = shards.index.relative

    def __len__(self) -> int:
        return len(self.shards)

    def name_of(self, index: int) -> str:
        return self.shards.read(index, "name")[1][0]

    def load_record(self, index: int) -> Record:
        names = ("name", "image_id", "boxes", "labels", "size", "crowd", "segments")
        content, (name, image_id, boxes, labels, size, crowd, segments) = self.shards.read(index, *names)
        size = None if size is None else tuple(size)
        return Record(Path(name), image_id, boxes, labels, size, crowd, segments if self.masks else None, content)


class ShardsDataModule(BaseDataModule):
    """Base of the data modules that read two splits of shards; combine it with one for a task.

    Args:
        root: Folder or URL that has `train` and `val`.
        cache: Local folder for the shards of a URL; None for ~/.cache/shunted_lit.
        cache_gb: Largest size of the cache in gigabytes; None for any.
        window: Number of shards whose images are mixed at a position of the training order.
        options: Options of the data module for the task.

    Raises:
        ValueError: Shards are missing, damaged, for another task, or of other classes. The message names them.
    """

    def __init__(
        self,
        root: str,
        *,
        cache: str | None = None,
        cache_gb: PositiveFloat | None = None,
        window: PositiveInt = 16,
        **options: Any,
    ):
        super().__init__(**options)
        check_minimum(1, window=window)
        check_positive(cache_gb=cache_gb)
        self.shards = {
            split: Shards(f"{root}/{split}", cache=cache, cache_gb=cache_gb, window=window)
            for split in ("train", "val")
        }
        train, val = self.shards["train"], self.shards["val"]
        self.class_names = train.index.classes
        if val.index.classes != self.class_names:
            raise ValueError(
                f"{val.root} must have the classes of {train.root}, {self.class_names}, got {val.index.classes}."
            )
        for shards in self.shards.values():
            if not annotation_covers(shards.index.annotation, self.annotation):
                raise ValueError(
                    f"{shards.root} has {shards.index.annotation}, but {self.annotation} are needed; choose other data."
                )

    def find_faults(self, split: str, decode: bool = False) -> tuple[list[str], list[str]]:
        """Return the shards that are missing or have another size; with `decode`, also the damaged images."""
        faults = self.shards[split].find_faults()
        if faults or not decode:
            return faults, []
        dataset = self.dataset(split)
        return [], find_damaged_samples(dataset, self.num_workers_for(dataset), True, split)


class ClassificationShardsDataModule(ShardsDataModule, ClassificationDataModule):
    """Labelled images in shards, as `shunted-lit shard --data ImageFolderDataModule` writes them.

    For the arguments see `ShardsDataModule` and `ClassificationDataModule`.
    """

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return ClassificationShards(self.shards[split], transform)


class DetectionShardsDataModule(ShardsDataModule, DetectionDataModule):
    """Images and objects in shards, as `shunted-lit shard` writes them for CocoDataModule or YoloDataModule.

    For the arguments see `ShardsDataModule` and `DetectionDataModule`.
    """

    def build_dataset(self, split: str, transform: Callable[..., Any]) -> Dataset[Any]:
        return DetectionShards(self.shards[split], masks=self.annotation == "masks", transform=transform)
