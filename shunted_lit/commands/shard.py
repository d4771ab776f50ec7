"""`shunted-lit shard`: write a data set of class folders, or in COCO's or YOLO's format, as shards."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from shunted_lit.commands.check import data_parser, find_all_faults, parse_data
from shunted_lit.data.classification import ClassFolderDataset
from shunted_lit.data.detection import FolderDataset
from shunted_lit.data.image_io import FORMATS, IMAGE_SUFFIXES
from shunted_lit.data.shards import INDEX, VERSION, is_url
from shunted_lit.data.validation import DataError
from shunted_lit.utils.checks import check_minimum
from shunted_lit.utils.files import fingerprint_files, lock_folder, write_atomically

DESCRIPTION = """Write a data set as shards: tar files in the format of WebDataset, which ClassificationShardsDataModule
and DetectionShardsDataModule read from a disk or an object store. Image files are copied byte for byte, training images
in random order. Shards are written in parallel (data.num_workers); an interrupted command is resumed by repeating it. A
config of `shunted-lit fit` can be used unchanged."""


class ShardDataset(Dataset[int]):
    """Write shard `i` when item `i` is read, unless it exists; the item is its number of bytes.

    Args:
        out: folder of the split.
        dataset: a `ClassFolderDataset` or `FolderDataset`.
        rows: indices of the images in each shard.
    """

    def __init__(self, out: Path, dataset: Any, rows: Sequence[Sequence[int]]):
        self.out, self.dataset, self.rows = out, dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> int:
        path = self.out / f"{number:06d}.tar"
        if not path.is_file():
            part = path.with_suffix(".part")
            self._write(part, number)
            part.replace(path)
        return path.stat().st_size

    def _write(self, path: Path, number: int) -> None:
        from webdataset import TarWriter

        with path.open("wb") as file:
            with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
                for position, index in enumerate(self.rows[number]):
                    image, record = read_record(self.dataset, index)
                    sample = {"__key__": f"{number:06d}{position:06d}", image_suffix(image)[1:]: read_bytes(image)}
                    if "label" in record:
                        sample["cls"] = str(record["label"]).encode()  # as in WebDataset's own examples
                    tar.write({**sample, "json": json.dumps(record).encode()})
            file.flush()
            os.fsync(file.fileno())


def image_suffix(image: Path) -> str:
    """Return the suffix of an image file; where the file name has none, as COCO allows, that of its format."""
    if image.suffix.lower() in IMAGE_SUFFIXES:
        return image.suffix.lower()
    with Image.open(image, formats=FORMATS) as opened:
        return f".{opened.format}".lower()


def read_bytes(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise ValueError(f"{image}: cannot be read ({error.strerror})") from error


def read_record(dataset: Any, index: int) -> tuple[Path, Mapping[str, Any]]:
    """Return the file and the labels of an image."""
    if isinstance(dataset, FolderDataset):
        record = dataset.records[index]
        labels = {name: getattr(record, name) for name in ("image_id", "boxes", "labels", "size", "crowd", "segments")}
        return record.path, {"name": str(record.path), **labels}
    path, label = dataset.samples[index]
    return Path(path), {"name": path, "label": label}


def shard(args: Sequence[str]) -> None:
    """Run `shunted-lit shard`.

    Args:
        args: words after `shunted-lit shard`.

    Raises:
        ValueError: data without image files, errors in the data, or a folder with shards of other data.
    """
    parser = data_parser("shard", DESCRIPTION, args)
    parser.add_argument("--out", type=str, required=True, help="new folder for the shards of both splits")
    parser.add_argument("--samples", type=int, default=1000, help="images per shard; about 100 MB per shard work well")
    data, config = parse_data(parser, args)
    out = Path(config.out)
    if is_url(config.out):
        raise ValueError(f"`out` must be a local folder, got {config.out}; copy the shards to the store later.")
    check_minimum(1, samples=config.samples)
    try:
        import webdataset  # noqa: F401 - an error here is clearer than one in each worker process
    except ImportError as error:
        raise ValueError("writing shards needs webdataset: pip install 'shunted-lit[shards]'") from error
    if faults := find_all_faults(data):
        raise DataError(faults, "data")
    for split in ("train", "val"):
        check_source(data, data.dataset(split), out)
    lock = lock_folder(out)
    for split in ("train", "val"):
        write_split(out / split, data, split, config.samples)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
    print(f"{config.out}: shards of {len(data.dataset('train'))} and {len(data.dataset('val'))} images")


def check_source(data: Any, dataset: Any, out: Path) -> None:
    """Raise ValueError if a data set has no image files, or if its images lie within `out` or around it."""
    if type(dataset) not in (ClassFolderDataset, FolderDataset):
        raise ValueError(
            f"{type(data).__name__} cannot be written as shards; use class folders, or data in COCO's or YOLO's format."
        )
    parents = {read_record(dataset, index)[0].parent.resolve() for index in range(len(dataset))}
    target = out.resolve()
    for folder in parents:
        if folder.is_relative_to(target) or target.is_relative_to(folder):
            raise ValueError(
                f"{out}: holds images of the data, or lies among them, such as in {folder}; choose another `--out`."
            )


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise ValueError(f"{file}: cannot be read; remove this folder, or choose another `--out`.")


def remove_damaged_shards(out: Path, description: Mapping[str, Any]) -> None:
    """Prepare a folder with shards for resuming: remove shards of a wrong size.

    Raises:
        ValueError: the shards are of other data.
    """
    for file in (out / "begun.json", out / INDEX):
        if not file.is_file() or not any(out.glob("*.tar")):
            continue
        existing = read_json(file)
        if {**existing, "shards": 0} != {**description, "shards": 0}:
            raise ValueError(
                f"{out}: holds shards of other data, of images that have changed since, or of another number of "
                "samples; choose another `--out`."
            )
        for entry in existing.get("shards", []):
            path = out / entry["name"]
            if path.is_file() and path.stat().st_size != entry["bytes"]:
                path.unlink()


def write_split(out: Path, data: Any, split: str, samples: int) -> None:
    """Write the shards of a split, and last its index."""
    dataset = data.dataset(split)
    images, records = zip(*(read_record(dataset, index) for index in range(len(dataset))), strict=True)
    description = {
        "version": VERSION,
        "annotation": data.annotation,
        "classes": data.class_names,
        "relative": getattr(dataset, "relative", False),  # boxes as fractions of the image
        "source": fingerprint_files(images, records),
        "samples": samples,
    }
    out.mkdir(parents=True, exist_ok=True)
    remove_damaged_shards(out, description)
    begun = out / "begun.json"
    write_atomically(begun, json.dumps(description))
    order = torch.arange(len(dataset))
    if split == "train":  # otherwise a shard, and so a training batch, would have images of one class
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    rows = [row.tolist() for row in order.split(samples)]
    loader = DataLoader(ShardDataset(out, dataset, rows), batch_size=None, num_workers=data.num_workers_for(dataset))
    console = Console(stderr=True)
    sizes = list(track(loader, f"Writing {split}", len(rows), transient=True, console=console,
                       disable=not console.is_terminal))  # fmt: skip
    shards = [
        {"name": f"{number:06d}.tar", "samples": len(row), "bytes": int(size)}
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True))
    ]
    write_atomically(out / INDEX, json.dumps({**description, "shards": shards}))
    begun.unlink()
