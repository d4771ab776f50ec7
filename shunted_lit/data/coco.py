"""Data in COCO's format: an annotation JSON and a folder of images for each split."""

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from shunted_lit.data.base import DetectionDataModule, FolderDataset, Record, Sample
from shunted_lit.data.masks import find_mask_fault, is_number
from shunted_lit.data.validation import BadBoxes, LabelCheck

MOST_PIXELS = 178_956_970  # of an image: what PIL refuses to read beyond
SLACK = 1.0  # pixels: COCO's own boxes overrun their images by less


class CocoDataModule(DetectionDataModule):
    """Reads COCO's published layout as it is, and any other by naming its files.

    Category ids are mapped to 0, 1, ... in the order of the ids. Crowd regions are not trained on and count neither as
    hit nor as miss in evaluation. Images without annotations are background; how many there are is logged.

    Args:
        root: folder that the other paths start from.
        train_images, train_annotations, val_images, val_annotations: folder and JSON of each split.
        batch_size, num_workers, flip, distort, crop: as in `DetectionDataModule`.
        bad_boxes: "error", or "drop" to leave objects whose box has no area or is outside the image, or whose mask is
            damaged, out, and log how many (COCO's own train2017 has a few).
        annotation: "boxes", or "masks" to read polygons and run lengths as well; from the task, in `shunted-lit`.
        check_images, skip_damaged: as in `BaseDataModule`.

    Raises:
        ValueError: naming the file and the id, where an annotation names no image or category, a box or a mask is not
            as it should be, an image is missing, ids repeat, or there is no image.
    """

    def __init__(
        self,
        root: str,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
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
        self.bad_boxes = bad_boxes
        base = Path(root)
        self.images = {"train": base / train_images, "val": base / val_images}
        self.annotations = {"train": base / train_annotations, "val": base / val_annotations}

    @cached_property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the ids; from the validation set, which is the smaller file."""
        file = self.annotations["val"]
        return read_categories(file, read_json(file))

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return list(self.categories.values())

    def build_dataset(self, split: str, transform: Callable[..., Sample]) -> Dataset[Sample]:
        file = self.annotations[split]
        content = read_json(file)
        if (categories := read_categories(file, content)) != self.categories:
            raise ValueError(
                f"{file} has other categories than {self.annotations['val']}: {categories} against {self.categories}"
            )
        check = LabelCheck(self.bad_boxes)
        masks = self.annotation == "masks"
        records = read_records(file, content, self.images[split], list(categories), check, split == "val", masks)
        self.report(check, file)
        return FolderDataset(records, relative=False, transform=transform, source=file)


def read_json(file: Path) -> dict[str, Any]:
    """The content of an annotation file, which must have images, annotations and categories."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such annotation file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable JSON file ({error})") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file}: has no list {key!r}; images, annotations and categories are needed")
    return content


def by_id(file: Path, kind: str, entries: list[Any], check: LabelCheck, *needed: str) -> dict[int, dict[str, Any]]:
    """Entries by their id; faults where an id repeats or an entry lacks what is needed."""
    found: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(key not in entry for key in ("id", *needed)):
            check.fail(f"{file}: {kind}[{i}] needs {', '.join(('id', *needed))}, but is {str(entry)[:80]}")
        elif not is_whole(entry["id"]):
            check.fail(f"{file}: {kind}[{i}] has the id {entry['id']!r}; a whole number is needed")
        elif entry["id"] in found:
            check.fail(f"{file}: {kind} holds the id {entry['id']} twice")
        else:
            found[entry["id"]] = entry
    return found


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_side(value: Any) -> bool:
    """Whether it may be the width or height of an image."""
    return is_whole(value) and 0 < value <= MOST_PIXELS


def read_categories(file: Path, content: dict[str, Any]) -> dict[int, str]:
    check = LabelCheck()
    categories = by_id(file, "categories", content["categories"], check, "name")
    check.report(file)
    names = Counter(str(entry["name"]) for entry in categories.values())
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{file}: categories has the name {repeated[0]!r} twice")
    if not categories:
        raise ValueError(f"{file}: categories is empty; at least one is needed")
    return {number: str(categories[number]["name"]) for number in sorted(categories)}


def read_records(
    file: Path,
    content: dict[str, Any],
    folder: Path,
    category_ids: list[int],
    check: LabelCheck,
    crowds: bool,
    masks: bool,
) -> list[Record]:
    """An entry an image of the file, in the order of the ids; crowd regions and segments only where asked for."""
    images = by_id(file, "images", content["images"], check, "file_name", "width", "height")
    records = {}
    for number in sorted(images):
        image, where = images[number], f"{file}: image {number}"
        sides = (image["width"], image["height"])
        if not (isinstance(image["file_name"], str) and all(map(is_side, sides)) and math.prod(sides) <= MOST_PIXELS):
            check.fail(f"{where} needs file_name as text, width and height as whole numbers of {MOST_PIXELS} pixels or "
                       f"less together: {str(image)[:200]}")  # fmt: skip
        elif ".." in Path(image["file_name"]).parts or Path(image["file_name"]).is_absolute():
            check.fail(f"{where} has the file_name {image['file_name']}, which is not within {folder}")
        else:
            size = (image["width"], image["height"])
            path = folder / image["file_name"]
            records[number] = Record(path, number, size=size, segments=[] if masks else None)
    for path, count in Counter(record.path for record in records.values()).items():
        if count > 1:
            check.fail(f"{file}: several images have the file_name {path.relative_to(folder)}")
    present = {path.relative_to(folder) for path in folder.rglob("*")} if folder.is_dir() else set()
    for record in records.values():
        if record.path.relative_to(folder) not in present:
            check.fail(f"{file}: image {record.image_id} is missing: there is no {record.path}")
    label = {category: i for i, category in enumerate(category_ids)}
    for number, entry in by_id(
        file, "annotations", content["annotations"], check, "image_id", "category_id", "bbox"
    ).items():
        where = f"{file}: annotation {number}"
        box = entry["bbox"]
        if not is_whole(entry["image_id"]) or entry["image_id"] not in images:
            check.fail(f"{where} names image {entry['image_id']!r}, which is not among the {len(images)} images")
        elif not is_whole(entry["category_id"]) or entry["category_id"] not in label:
            check.fail(f"{where} names category {entry['category_id']!r}, but categories has {category_ids}")
        elif not (isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)):
            check.fail(f"{where}: bbox is {box}, but four finite numbers x y width height are needed")
        elif entry.get("iscrowd", 0) not in (0, 1):
            check.fail(f"{where}: iscrowd is {entry['iscrowd']!r}, but 0 or 1 is needed")
        elif entry["image_id"] in records and (crowds or not entry.get("iscrowd")):
            add_object(records[entry["image_id"]], entry, label[entry["category_id"]], check, where)
    return list(records.values())


def add_object(record: Record, entry: dict[str, Any], label: int, check: LabelCheck, where: str) -> None:
    """Adds an annotation to the image it is of, unless its box or its mask is at fault."""
    x, y, w, h = entry["bbox"]
    corners = (x, y, x + w, y + h)
    width, height = record.size or (0, 0)
    if record.segments is not None and "segmentation" not in entry:
        check.fail(f"{where} has no segmentation, but masks are wanted; add it, or train on boxes alone")
    elif check.accepts(corners, width, height, SLACK, where):
        if record.segments is not None:
            if fault := find_mask_fault(entry["segmentation"], height, width, SLACK):
                check.reject(f"{where}: segmentation {fault}")
                return
            record.segments.append(entry["segmentation"])
        record.boxes.append(corners)
        record.labels.append(label)
        record.crowd.append(bool(entry.get("iscrowd")))
