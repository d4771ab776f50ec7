"""Data in COCO's format: an annotation JSON and a folder of images for each split."""

import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse.typing import ClosedUnitInterval
from torch.utils.data import Dataset

from shunted_lit.data.detection import DetectionDataModule, FolderDataset, Record, Sample
from shunted_lit.data.image_io import MAX_PIXELS, read_text
from shunted_lit.data.masks import find_mask_fault
from shunted_lit.data.splits import HeldOutDataModule
from shunted_lit.data.validation import BadBoxes, LabelCheck, find_repeated, is_integer, is_number

Records = dict[int, Record | None]  # by image id; None for an image with a faulty entry
SLACK = 1.0  # pixels by which a box may exceed its image; COCO's own boxes exceed theirs by less


class CocoDataModule(HeldOutDataModule, DetectionDataModule):
    """Images and annotations in COCO's format; the defaults match COCO 2017 as published.

    Category ids are mapped to 0, 1, ... in the order of the ids. Crowd regions are not trained on, and evaluation
    counts them neither as hits nor as misses. Images without annotations are background; their number is logged.

    Args:
        root: Folder that the other paths are relative to.
        train_images: Folder of the training images.
        train_annotations: JSON file of the training annotations.
        val_images: Folder of the validation images.
        val_annotations: JSON file of the validation annotations.
        crop: Probability of cropping a training image to a region that keeps some objects.
        bad_boxes: "error", or "drop" to skip and count objects with a damaged mask, or with a box that has no area or
            is outside the image (COCO's train2017 has a few).
        options: Options of `DetectionDataModule` and `HeldOutDataModule`.

    Raises:
        ValueError: An annotation names no image or category, has a wrong box or mask, or repeats an id; an image is
            missing; or there is no image. The message has the file and the id.
    """

    def __init__(
        self,
        root: str,
        *,
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        crop: ClosedUnitInterval = 0.5,
        bad_boxes: BadBoxes = "error",
        **options: Any,
    ):
        super().__init__(crop=crop, **options)
        self.root, self.bad_boxes = Path(root), bad_boxes
        self.images = {"train": Path(root, train_images), "val": Path(root, val_images)}
        self.annotations = {"train": Path(root, train_annotations), "val": Path(root, val_annotations)}

    @cached_property
    def categories(self) -> dict[int, str]:
        """Names by id, in the order of the ids, from the validation split if any, whose file is smaller."""
        file = self.annotations[self.split_to_read("val", **self.annotations)]
        return read_categories(file, read_json(file))

    @property
    def class_names(self) -> list[str]:  # type: ignore[override]
        return list(self.categories.values())

    def build_dataset(self, split: str, transform: Callable[..., Sample]) -> Dataset[Sample]:
        source = self.split_to_read(split, **self.annotations)
        file = self.annotations[source]
        content = read_json(file)
        if (categories := read_categories(file, content)) != self.categories:
            raise ValueError(
                f"{file} must have the categories of {self.annotations['val']}, {self.categories}, got {categories}."
            )
        check = LabelCheck(self.bad_boxes)
        records = read_images(file, content["images"], self.images[source], check, masks=self.annotation == "masks")
        add_annotations(file, content["annotations"], records, list(categories), check, crowds=split == "val")
        self.report(check, file)
        present = [record for record in records.values() if record is not None]
        present = [present[row] for row in self.select(split, [record.path for record in present])]
        return FolderDataset(present, relative=False, transform=transform, source=file)


def read_json(file: Path) -> dict[str, Any]:
    """Read an annotation file, which must have lists of images, annotations and categories."""
    try:
        content = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not a readable JSON file ({error}).") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{file}: has no list {key!r}; expected images, annotations and categories.")
    return content


def index_by_id(file: Path, kind: str, entries: list[Any], check: LabelCheck, *keys: str) -> dict[int, dict[str, Any]]:
    """Return entries by their id; record a fault for an id that repeats, or an entry that lacks one of `keys`."""
    by_id: dict[int, dict[str, Any]] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or any(key not in entry for key in ("id", *keys)):
            check.fail(f"{file}: {kind}[{i}] must have {', '.join(('id', *keys))}, got {str(entry)[:80]}.")
        elif not is_integer(entry["id"]):
            check.fail(f"{file}: the id of {kind}[{i}] must be an integer, got {entry['id']!r}.")
        elif entry["id"] in by_id:
            check.fail(f"{file}: {kind} has the id {entry['id']} twice.")
        else:
            by_id[entry["id"]] = entry
    return by_id


def read_categories(file: Path, content: dict[str, Any]) -> dict[int, str]:
    """Return the names of the categories by id, in the order of the ids."""
    check = LabelCheck()
    categories = index_by_id(file, "categories", content["categories"], check, "name")
    check.report(file)
    if not categories:
        raise ValueError(f"{file}: `categories` must have at least one entry, got none.")
    names = {number: str(categories[number]["name"]) for number in sorted(categories)}
    if repeated := find_repeated(names.values()):
        raise ValueError(f"{file}: categories has the name {repeated[0]!r} twice.")
    return names


def is_size(width: Any, height: Any) -> bool:
    """Return whether both sides are integers above 0, of at most `MAX_PIXELS` pixels together."""
    sides = (width, height)
    return all(is_integer(side) and 0 < side <= MAX_PIXELS for side in sides) and math.prod(sides) <= MAX_PIXELS


def read_images(file: Path, entries: list[Any], folder: Path, check: LabelCheck, *, masks: bool) -> Records:
    """Return a record without objects for each image, in the order of the ids."""
    images = index_by_id(file, "images", entries, check, "file_name", "width", "height")
    records: Records = dict.fromkeys(sorted(images))
    present = {path.relative_to(folder) for path in folder.rglob("*")} if folder.is_dir() else set()
    missing = []
    for number in records:
        image, where = images[number], f"{file}: image {number}"
        name, width, height = image["file_name"], image["width"], image["height"]
        if not isinstance(name, str) or not is_size(width, height):
            check.fail(
                f"{where} must have file_name as text, and width and height as integers of at most {MAX_PIXELS} pixels "
                f"together, got {str(image)[:200]}."
            )
        elif ".." in Path(name).parts or Path(name).is_absolute():
            check.fail(f"{where} has the file_name {name}, which is not within {folder}.")
        else:
            path = folder / name
            records[number] = Record(path, number, size=(width, height), segments=[] if masks else None)
            if path.relative_to(folder) not in present:
                missing.append(f"{where} is missing: there is no {path}.")
    for path in find_repeated(record.path for record in records.values() if record):
        check.fail(f"{file}: several images have the file_name {path.relative_to(folder)}.")
    for message in missing:
        check.fail(message)
    return records


def add_annotations(
    file: Path, entries: list[Any], records: Records, category_ids: list[int], check: LabelCheck, *, crowds: bool
) -> None:
    """Add the objects of an annotation file to the records of their images; crowd regions only where `crowds`."""
    label = {category: i for i, category in enumerate(category_ids)}
    annotations = index_by_id(file, "annotations", entries, check, "image_id", "category_id", "bbox")
    for number, entry in annotations.items():
        where = f"{file}: annotation {number}"
        image_id, category, box, crowd = entry["image_id"], entry["category_id"], entry["bbox"], entry.get("iscrowd", 0)
        if not is_integer(image_id) or image_id not in records:
            check.fail(f"{where} names image {image_id!r}, which is not among the {len(records)} images.")
        elif not is_integer(category) or category not in label:
            check.fail(f"{where} names category {category!r}, but categories has {category_ids}.")
        elif not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
            check.fail(f"{where}: bbox must be four finite numbers x y width height, got {box}.")
        elif crowd not in (0, 1):
            check.fail(f"{where}: iscrowd must be 0 or 1, got {crowd!r}.")
        elif (record := records[image_id]) is not None and (crowds or not crowd):
            add_object(record, entry, label[category], check, where)


def add_object(record: Record, entry: dict[str, Any], label: int, check: LabelCheck, where: str) -> None:
    """Add an annotation to the record of its image, unless its box or its mask is faulty."""
    x, y, w, h = entry["bbox"]
    box = (x, y, x + w, y + h)
    width, height = record.size or (0, 0)
    if record.segments is not None and "segmentation" not in entry:
        check.fail(f"{where} has no segmentation, but masks are needed; add it, or train on boxes alone.")
    elif check.accepts(box, width, height, SLACK, where):
        if record.segments is not None:
            if fault := find_mask_fault(entry["segmentation"], height, width, SLACK):
                check.reject(f"{where}: segmentation {fault}")
                return
            record.segments.append(entry["segmentation"])
        record.boxes.append(box)
        record.labels.append(label)
        record.crowd.append(bool(entry.get("iscrowd")))
