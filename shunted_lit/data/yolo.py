"""Data in YOLO's format: an existing data.yaml works unchanged."""

import logging
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from torch.utils.data import Dataset

from shunted_lit.data.base import DetectionDataModule, FolderDataset, Record, Sample
from shunted_lit.data.image_io import IMAGE_SUFFIXES, read_lines, warn_unsupported_images
from shunted_lit.data.masks import Segment
from shunted_lit.data.validation import BadBoxes, LabelCheck

log = logging.getLogger(__name__)

SLACK = 1e-3  # of the image: what six decimals and a resize round


class YoloDataModule(DetectionDataModule):
    """Reads `data.yaml`: `path` (from the file's own folder, else from where one works), `train` and `val` (a folder, a
    .txt list of images, or several), `names` (list or mapping).

    Labels stand in `labels/` beside `images/`, or next to the image where no folder is named images: a line an object,
    `class cx cy w h` in fractions of the image, or `class x1 y1 x2 y2 x3 y3 ...`, a polygon, whose box is taken; where
    masks are wanted, each line needs one. An image without a label file, or with an empty one, is background; how many
    there are is logged.

    Args:
        data: path of data.yaml.
        batch_size, num_workers, flip, distort, crop: as in `DetectionDataModule`.
        bad_boxes: "error", or "drop" to leave boxes of no area or outside their image out, and log how many.
        annotation: "boxes", or "masks" to read polygons as masks; from the task, in `shunted-lit`.
        check_images, skip_damaged: as in `BaseDataModule`.

    Raises:
        ValueError: naming the file and line, where data.yaml or a label file is not as above, a class is not among
            the names, an image that a list or a label file tells of is missing, or there is no image.
    """

    def __init__(
        self,
        data: str,
        batch_size: int = 16,
        num_workers: int = 2,
        flip: float = 0.5,
        distort: float = 0.5,
        crop: float = 0.5,
        bad_boxes: BadBoxes = "error",
        annotation: str | None = None,
        check_images: bool = True,
        skip_damaged: int = 0,
    ):
        super().__init__(batch_size, num_workers, flip, distort, crop, annotation, check_images, skip_damaged)
        self.save_hyperparameters(logger=False)
        self.file, self.bad_boxes = Path(data), bad_boxes
        self.content = read_data_yaml(self.file)
        self.class_names = self.content["names"]

    def build_dataset(self, split: str, transform: Callable[..., Sample]) -> Dataset[Sample]:
        check = LabelCheck(self.bad_boxes)
        images = list_images(self.file, self.content, split, check)
        labelled = [label_path(image) for image in images]
        for label in (label for label, count in Counter(labelled).items() if count > 1):
            check.fail(f"{self.file}, {split}: {label} belongs to several images, or one is named twice")
        if split == "val" and self.content["train"] == self.content["val"]:
            log.warning("%s: train and val are the same images, so scores tell nothing of others", self.file)
        masks = self.annotation == "masks"
        records = []
        for i, (image, label) in enumerate(zip(images, labelled, strict=True)):
            boxes, labels, segments = read_labels(label, self.class_names, check, masks)
            records.append(Record(image, i, boxes, labels, segments=segments if masks else None))
        find_orphans(images, labelled, check)
        self.report(check, self.file)
        return FolderDataset(records, relative=True, transform=transform, source=f"{self.file}, {split}")


def read_data_yaml(file: Path) -> dict[str, Any]:
    """The content of data.yaml, `names` made a list."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; name the data.yaml of your data set") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: not a readable YAML file ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: has no entries; train, val and names are needed")
    if missing := [key for key in ("train", "val", "names") if not content.get(key)]:
        raise ValueError(f"{file}: {', '.join(missing)} missing; train, val and names are needed")
    names = content["names"]
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{file}: names has the keys {list(names)}, but numbers 0 to {len(names) - 1} are needed")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list):
        raise ValueError(f"{file}: names is a {type(names).__name__}; a list, or a mapping from 0, 1, ... is needed")
    for label, name in enumerate(names):
        if not isinstance(name, str | int | float):  # lists in it, which YAML's aliases may make huge, are not printed
            raise ValueError(f"{file}: the name of class {label} is a {type(name).__name__}, but text is needed")
    if repeated := [name for name, count in Counter(map(str, names)).items() if count > 1]:
        raise ValueError(f"{file}: names holds {repeated[0]!r} twice")
    nc = content.get("nc", len(names))
    if not isinstance(nc, int | float | str) or nc != len(names):
        told = repr(nc) if isinstance(nc, int | float | str) else f"a {type(nc).__name__}"
        raise ValueError(f"{file}: nc is {told}, but names has {len(names)} entries")
    return {**content, "names": [str(name) for name in names]}


def list_images(file: Path, content: dict[str, Any], split: str, check: LabelCheck) -> list[Path]:
    """Images of "train" or "val", sorted within each folder or list."""
    for key in ("path", split):
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) and key == split else [entries or "."]:
            if not isinstance(entry, str):
                raise ValueError(f"{file}: {key} is, or holds, a {type(entry).__name__}, but text is needed")
    root = file.parent / str(content.get("path") or ".")
    if not root.is_dir() and (here := Path(str(content["path"]))).is_dir():
        root = here  # as Ultralytics reads it: from where one works
    sources = content[split] if isinstance(content[split], list) else [content[split]]
    images: list[Path] = []
    for source in (root / str(entry) for entry in sources):
        if source.is_dir():
            paths = sorted(source.rglob("*"))
            images += [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
            warn_unsupported_images(source, paths)
            if links := [path for path in paths if path.is_symlink() and path.is_dir()]:
                log.warning("%s: %d links to folders are not entered, such as %s", source, len(links), links[0])
        elif source.is_file() and source.suffix == ".txt":
            for number, line in enumerate(read_lines(source), 1):
                if line.strip():
                    image = source.parent / line.strip()
                    if image.is_file():
                        images.append(image)
                    else:
                        check.fail(f"{source}, line {number}: there is no image {image}")
        else:
            raise ValueError(f"{file}: {split} names {source}, which is neither a folder nor a .txt list of images")
    if not images:
        raise ValueError(f"{file}: {split} holds no images; they end in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return images


def label_path(image: Path) -> Path:
    """Where the labels of an image stand: the last folder called images becomes labels."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def find_orphans(images: list[Path], labelled: list[Path], check: LabelCheck) -> None:
    """A label file whose image is missing is a fault: its objects would be lost in silence."""
    folders = {label.parent: image.parent for image, label in zip(images, labelled, strict=True)}
    for labels, pictures in sorted(folders.items()):
        if labels == pictures or not labels.is_dir():
            continue  # beside the images, other text files may stand too
        stems = {path.stem for path in pictures.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES}
        for file in sorted(labels.glob("*.txt")):
            if file.stem not in stems and file.name != "classes.txt":
                check.fail(f"{file}: no image in {pictures} belongs to these labels; add it, or remove the file")


def read_labels(
    file: Path, names: list[str], check: LabelCheck, masks: bool = False
) -> tuple[list[tuple[float, float, float, float]], list[int], list[Segment]]:
    """Boxes (x1 y1 x2 y2, in fractions of the image), classes and polygons of a label file; none where there is none.

    Where `masks`, a line without a polygon is a fault.
    """
    boxes, labels = [], []
    segments: list[Segment] = []
    try:
        there = file.exists() or file.is_symlink()  # one that leads nowhere is no background
        lines = read_lines(file) if there else []
    except (OSError, ValueError) as error:
        check.fail(str(error))
        lines = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            label, rest = read_line(line, names, masks)
        except ValueError as error:
            check.fail(f"{where}: {error}")
            continue
        if len(rest) == 4:
            cx, cy, w, h = rest
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        else:
            box = (min(rest[0::2]), min(rest[1::2]), max(rest[0::2]), max(rest[1::2]))
        if check.accepts(box, 1, 1, SLACK, where):
            boxes.append(box)
            labels.append(label)
            segments.append([rest])
    return boxes, labels, segments


def read_line(line: str, names: list[str], masks: bool) -> tuple[int, list[float]]:
    """Class and coordinates; ValueError where they are none."""
    try:
        values = [float(word) for word in line.split()]
    except ValueError:
        raise ValueError(f"{line.strip()!r} is not all numbers; class cx cy w h is needed") from None
    if len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
        raise ValueError(
            f"{len(values)} numbers; class cx cy w h (5) or class x1 y1 x2 y2 x3 y3 ... (7, 9, ...) needed"
        )
    if not all(map(math.isfinite, values)):
        raise ValueError(f"{line.strip()!r} holds a number that is not finite")
    label, *rest = values
    if label != int(label) or not 0 <= label < len(names):
        raise ValueError(f"class {label:g}, but names has the classes 0 to {len(names) - 1}")
    if masks and len(rest) == 4:
        raise ValueError("a box, but masks are wanted: class x1 y1 x2 y2 x3 y3 ... is needed on each line")
    return int(label), rest
