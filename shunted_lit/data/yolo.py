"""Data in YOLO's format; an existing data.yaml works unchanged."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse.typing import ClosedUnitInterval
from torch.utils.data import Dataset

from shunted_lit.data.detection import Box, DetectionDataModule, FolderDataset, Record, Sample
from shunted_lit.data.image_io import IMAGE_ENDINGS, IMAGE_SUFFIXES, find_images, read_text
from shunted_lit.data.splits import HeldOutDataModule
from shunted_lit.data.validation import BadBoxes, LabelCheck, find_repeated

log = logging.getLogger(__name__)

SLACK = 1e-3  # of the image, by which a box may exceed it: rounding to six decimals and resizing


class YoloDataModule(HeldOutDataModule, DetectionDataModule):
    """Images and labels that a `data.yaml` names.

    `data.yaml` has `train` and `val` (a folder, a .txt list of images, or a list of these), `names` (list or mapping)
    and optionally `path`, the folder that the splits are relative to: below the folder of `data.yaml`, else below the
    working directory.

    The labels of `images/a.jpg` are in `labels/a.txt`, or next to the image where no folder is called images. Each line
    is an object: `class cx cy w h` in fractions of the image, or a polygon `class x1 y1 x2 y2 x3 y3 ...`, whose
    bounding box is used; for masks, each line must be a polygon. An image with no label file, or an empty one, is
    background; the number of these is logged.

    Args:
        data: Path of `data.yaml`.
        crop: Probability of cropping a training image to a region that keeps some objects.
        bad_boxes: "error", or "drop" to skip and count boxes that have no area or are outside their image.
        options: Options of `DetectionDataModule` and `HeldOutDataModule`; `root` is then the folder that
            the splits are relative to.

    Raises:
        ValueError: `data.yaml` or a label file is not as above, a class is not among the names, an image that a list or
            a label file belongs to is missing, or there is no image. The message has the file and the line.
    """

    def __init__(self, data: str, *, crop: ClosedUnitInterval = 0.5, bad_boxes: BadBoxes = "error", **options: Any):
        super().__init__(crop=crop, **options)
        self.file, self.bad_boxes = Path(data), bad_boxes
        self.content = read_data_yaml(self.file, needs_val=not self.holds_out)
        self.root = find_root(self.file, self.content)
        self.class_names = self.content["names"]
        if self.holds_out and self.content.get("val") not in (None, self.content["train"]):
            raise ValueError(
                f"{self.file}: `val` must be missing or the same as `train` with `val_fraction` or `val_list`, got "
                f"{str(self.content['val'])[:80]}; omit the option, or remove `val`."
            )

    def build_dataset(self, split: str, transform: Callable[..., Sample]) -> Dataset[Sample]:
        check = LabelCheck(self.bad_boxes)
        images = list_images(self.file, self.content, self.root, "train" if self.holds_out else split, check)
        images = [images[row] for row in self.select(split, images)]
        label_files = [label_path(image) for image in images]
        for file in find_repeated(label_files):
            check.fail(f"{self.file}, {split}: {file} belongs to several images, or to one that is named twice.")
        if split == "val" and not self.holds_out and self.content["train"] == self.content["val"]:
            log.warning(
                "%s: train and val are the same images, so the scores are not those of held-out data; set "
                "`val_fraction` to hold some out",
                self.file,
            )
        masks = self.annotation == "masks"
        records = [Record(image, i, segments=[] if masks else None) for i, image in enumerate(images)]
        for record, file in zip(records, label_files, strict=True):
            read_labels(file, record, self.class_names, check)
        find_orphans(images, label_files, check)
        self.report(check, self.file)
        return FolderDataset(records, relative=True, transform=transform, source=f"{self.file}, {split}")


def read_data_yaml(file: Path, *, needs_val: bool = True) -> dict[str, Any]:
    """Read `data.yaml`, with `names` as a list."""
    try:
        content = yaml.safe_load(read_text(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not a readable YAML file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: has no entries; train, val and names are needed.")
    if missing := [key for key in ("train", "val", "names") if not content.get(key) and (needs_val or key != "val")]:
        problem = f"{file}: {', '.join(missing)} missing; train, val and names are needed"
        remedy = ", or `val_fraction`, such as 0.2, to hold out training images instead of val"
        raise ValueError(f"{problem}{remedy if missing == ['val'] else ''}.")
    names = content["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{file}: the keys of names must be 0 to {len(names) - 1}, got {list(names)}.")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{file}: names must be a list, or a mapping from 0, 1, ..., got a {type(names).__name__}.")
    for label, name in enumerate(names):
        if not isinstance(name, str | int | float):  # a list is not printed: YAML's aliases may make it huge
            raise ValueError(f"{file}: the name of class {label} must be text, got a {type(name).__name__}.")
    names = [str(name) for name in names]
    if repeated := find_repeated(names):
        raise ValueError(f"{file}: names has {repeated[0]!r} twice.")
    nc = content.get("nc", len(names))
    if not isinstance(nc, int | float | str) or nc != len(names):
        given = repr(nc) if isinstance(nc, int | float | str) else f"a {type(nc).__name__}"
        raise ValueError(f"{file}: nc must be {len(names)}, the number of names, got {given}.")
    return {**content, "names": names}


def check_text(file: Path, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{file}: {key} must be text, got a {type(value).__name__}.")


def find_root(file: Path, content: dict[str, Any]) -> Path:
    """Return the folder that the splits are relative to."""
    path = content.get("path") or "."
    check_text(file, "path", path)
    root = file.parent / path
    if not root.is_dir() and Path(path).is_dir():
        root = Path(path)  # relative to the working directory, as Ultralytics reads it
    return root


def list_images(file: Path, content: dict[str, Any], root: Path, split: str, check: LabelCheck) -> list[Path]:
    """Return the images of "train" or "val", sorted within each folder or list."""
    sources = content[split] if isinstance(content[split], list) else [content[split]]
    for source in sources:
        check_text(file, split, source)
    images: list[Path] = []
    for source in (root / entry for entry in sources):
        if source.is_dir():
            images += find_images(source)
        elif source.is_file() and source.suffix == ".txt":
            for number, line in enumerate(read_text(source).splitlines(), 1):
                if line.strip() and not (source.parent / line.strip()).is_file():
                    check.fail(f"{source}:{number}: there is no image {source.parent / line.strip()}.")
                elif line.strip():
                    images.append(source.parent / line.strip())
        else:
            raise ValueError(f"{file}: {split} names {source}, which is neither a folder nor a .txt list of images.")
    if not images:
        raise ValueError(f"{file}: {split} has no images; their names must end in {IMAGE_ENDINGS}.")
    return images


def label_path(image: Path) -> Path:
    """Return the label file of an image: the last folder called images becomes labels."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def find_orphans(images: list[Path], label_files: list[Path], check: LabelCheck) -> None:
    """Record a fault for each label file whose image is missing, since its objects would be lost silently."""
    folders = {label.parent: image.parent for image, label in zip(images, label_files, strict=True)}
    for labels, pictures in sorted(folders.items()):
        if labels == pictures or not labels.is_dir():
            continue  # text files next to images may be anything
        stems = {path.stem for path in pictures.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
        for file in sorted(labels.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":
                check.fail(f"{file}: no image in {pictures} belongs to these labels; add it, or remove the file.")


def read_labels(file: Path, record: Record, names: list[str], check: LabelCheck) -> None:
    """Add the objects of a label file, in fractions of the image, to a record; none where there is no file.

    Where the record has segments, a line without a polygon is a fault.
    """
    if not file.exists() and not file.is_symlink():  # a broken link is a fault, not background
        return
    try:
        lines = read_text(file).splitlines()
    except ValueError as error:
        check.fail(str(error))
        return
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            label, numbers = parse_line(line, names, record.segments is not None)
        except ValueError as error:
            check.fail(f"{where}: {error}")
            continue
        box = enclosing_box(numbers)
        if check.accepts(box, 1, 1, SLACK, where):
            record.boxes.append(box)
            record.labels.append(label)
            if record.segments is not None:
                record.segments.append([numbers])


def parse_line(line: str, names: list[str], masks: bool) -> tuple[int, list[float]]:
    """Return the class of a label line, and the numbers after it: cx cy w h, or a polygon.

    Raises:
        ValueError: The line is not of that form, or no polygon although `masks` are needed.
    """
    try:
        label, *numbers = [float(word) for word in line.split()]
    except ValueError:
        raise ValueError(f"expected numbers (class cx cy w h), got {line.strip()!r}.") from None
    count = 1 + len(numbers)
    if count != 5 and (count < 7 or count % 2 == 0):
        raise ValueError(
            f"expected 5 numbers (class cx cy w h), or 7, 9, ... (class x1 y1 x2 y2 x3 y3 ...), got {count}."
        )
    if not all(map(math.isfinite, (label, *numbers))):
        raise ValueError(f"numbers must be finite, got {line.strip()!r}.")
    if label != int(label) or not 0 <= label < len(names):
        raise ValueError(f"class must be 0 to {len(names) - 1}, an index of names, got {label:g}.")
    if masks and count == 5:
        raise ValueError("masks need a polygon on each line (class x1 y1 x2 y2 x3 y3 ...), got a box.")
    return int(label), numbers


def enclosing_box(numbers: list[float]) -> Box:
    """Return x1 y1 x2 y2 of a box cx cy w h, or around a polygon."""
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        return (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
    xs, ys = numbers[0::2], numbers[1::2]
    return (min(xs), min(ys), max(xs), max(ys))
