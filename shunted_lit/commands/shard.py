"""`shunted-lit shard`: a folder of images, or a set in COCO's or YOLO's format, as shards."""

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

from shunted_lit.commands.check import data_parser, faults_of, parse_data
from shunted_lit.data.classification import ClassFolderDataset
from shunted_lit.data.detection import FolderDataset
from shunted_lit.data.image_io import FORMATS, IMAGE_SUFFIXES
from shunted_lit.data.shards import INDEX, VERSION, is_url
from shunted_lit.data.validation import DataError
from shunted_lit.utils.files import fingerprint_files, lock_folder, write_atomically

HELP = """Writes a data set as shards, tar files in the format of WebDataset, which ClassificationShardsDataModule and
DetectionShardsDataModule read from a disk or an object store. Images are as they were, byte for byte; those to train on
in a random order. In parallel (data.num_workers); where it was cut off, the same words go on. A config of
`shunted-lit fit` works as it is."""


class Writing(Dataset[int]):
    """Shard `i` is written when item i is asked for, unless it is there; gives its number of bytes.

    Args:
        out: folder of the split.
        dataset: `ClassFolders` or `FolderDataset`.
        rows: for each shard, its images.
    """

    def __init__(self, out: Path, dataset: Any, rows: Sequence[Sequence[int]]):
        self.out, self.dataset, self.rows = out, dataset, rows

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, number: int) -> Path:
        return self.out / f"{number:06d}.tar"

    def __getitem__(self, number: int) -> int:
        path = self.path(number)
        if not path.is_file():
            from webdataset import TarWriter

            part = path.with_suffix(".part")
            with part.open("wb") as file:
                with TarWriter(file, encoder=False, mtime=0, user="", group="") as tar:
                    for place, index in enumerate(self.rows[number]):
                        image, known = entry_of(self.dataset, index)
                        sample = {"__key__": f"{number:06d}{place:06d}", suffix_of(image)[1:]: read_bytes(image)}
                        if "label" in known:
                            sample["cls"] = str(known["label"]).encode()  # as WebDataset's own examples have it
                        tar.write({**sample, "json": json.dumps(known).encode()})
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        return path.stat().st_size


def suffix_of(image: Path) -> str:
    """Of the file, or where that is none of an image's, as COCO may have it, of the format."""
    if image.suffix.lower() in IMAGE_SUFFIXES:
        return image.suffix.lower()
    with Image.open(image, formats=FORMATS) as opened:
        return f".{opened.format}".lower()


def read_bytes(image: Path) -> bytes:
    try:
        return image.read_bytes()
    except OSError as error:
        raise ValueError(f"{image}: can't be read ({error.strerror})") from error


def entry_of(dataset: Any, index: int) -> tuple[Path, Mapping[str, Any]]:
    """File of an image, and what is known of it."""
    if isinstance(dataset, FolderDataset):
        record = dataset.records[index]
        known = {name: getattr(record, name) for name in ("image_id", "boxes", "labels", "size", "crowd", "segments")}
        return record.path, {"name": str(record.path), **known}
    path, label = dataset.samples[index]
    return Path(path), {"name": path, "label": label}


def shard(words: Sequence[str]) -> None:
    """The command line.

    Raises:
        ValueError: data that have no files of images, faults in them, or a folder that holds shards of other data.
    """
    parser = data_parser("shard", HELP, words)
    parser.add_argument("--out", type=str, required=True, help="new folder, for train and val")
    parser.add_argument("--samples", type=int, default=1000, help="images a shard; about 100 MB in all are a good size")
    data, config = parse_data(parser, words)
    out = Path(config.out)
    if is_url(config.out):
        raise ValueError(f"out is {config.out}, but shards are written to a folder; copy that to the store then")
    if config.samples < 1:
        raise ValueError(f"samples is {config.samples}, but 1 or more images a shard are needed")
    try:
        import webdataset  # noqa: F401 - here, not in each process
    except ImportError as error:
        raise ValueError("shards are written by webdataset: pip install 'shunted-lit[shards]'") from error
    if faults := faults_of(data):
        raise DataError(faults, "data")
    for split in ("train", "val"):
        dataset = data.dataset(split)
        if type(dataset) not in (ClassFolderDataset, FolderDataset):
            raise ValueError(f"{type(data).__name__} can't be written as shards, but folders of classes, COCO and YOLO")
        parents = {entry_of(dataset, index)[0].parent for index in range(len(dataset))}
        folders, place = [folder.resolve() for folder in parents], out.resolve()
        if near := [f for f in folders if f.is_relative_to(place) or place.is_relative_to(f)]:
            raise ValueError(f"{out}: holds images of the data, such as in {near[0]}; name another folder")
    lock = lock_folder(out)
    for split in ("train", "val"):
        write(out / split, data.dataset(split), data, split, config.samples)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)
    print(f"{config.out}: shards of {len(data.dataset('train'))} and {len(data.dataset('val'))} images")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    raise ValueError(f"{file}: can't be read; remove this folder, or name a new one")


def write(out: Path, dataset: Any, data: Any, split: str, samples: int) -> None:
    """A split, its index last."""
    images, known = zip(*(entry_of(dataset, index) for index in range(len(dataset))), strict=True)
    origin = {
        "version": VERSION,
        "annotation": data.annotation,
        "classes": data.class_names,
        "relative": getattr(dataset, "relative", False),  # boxes in fractions of the image
        "source": fingerprint_files(images, known),
        "samples": samples,
    }
    out.mkdir(parents=True, exist_ok=True)
    begun = out / "begun.json"
    for file in (begun, out / INDEX):
        if file.is_file() and any(out.glob("*.tar")):
            there = read_json(file)
            if {**there, "shards": 0} != {**origin, "shards": 0}:
                raise ValueError(
                    f"{out}: holds shards of other data, of images that have changed since, or of another number of "
                    "samples; name a new folder"
                )
            for shard in there.get("shards", []):  # those that were damaged or lost are written again
                path = out / shard["name"]
                if path.is_file() and path.stat().st_size != shard["bytes"]:
                    path.unlink()
    write_atomically(begun, json.dumps(origin))
    order = torch.arange(len(dataset))
    if split == "train":  # else a shard would be of one class, and so would what a step sees
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    rows = [row.tolist() for row in order.split(samples)]
    loader = DataLoader(Writing(out, dataset, rows), batch_size=None, num_workers=data.num_workers)
    console = Console(stderr=True)
    sizes = list(track(loader, f"Writing {split}", len(rows), transient=True, console=console,
                       disable=not console.is_terminal))  # fmt: skip
    shards = [
        {"name": f"{number:06d}.tar", "samples": len(row), "bytes": int(size)}
        for number, (row, size) in enumerate(zip(rows, sizes, strict=True))
    ]
    write_atomically(out / INDEX, json.dumps({**origin, "shards": shards}))
    begun.unlink()
