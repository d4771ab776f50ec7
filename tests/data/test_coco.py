"""Data in COCO's format, with masks."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.readers import STILL, coco_files, edit_annotations, read_coco, read_yolo, same_masks

from shunted_lit.data import ShapesDataModule
from shunted_lit.data.masks import draw_mask, encode_run_lengths


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(image_id=77), "annotation 2 names image 77"),
        (lambda c: c["annotations"][1].update(category_id=77), "annotation 2 names category 77"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
            r"annotation 2: bbox must be four finite .*, got \[1, 2, 3\]",
        ),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3, "4"]), "annotation 2: bbox must be four"),
        (lambda c: c["annotations"][1].update(bbox=[90, 2, 30, 4]), "annotation 2: the box .* not within"),
        (lambda c: c["annotations"][1].update(bbox=[9, 2, 0, 4]), "annotation 2: the box .* has no area"),
        (lambda c: c["annotations"][1].update(id=1), "annotations has the id 1 twice"),
        (lambda c: c["annotations"][1].pop("bbox"), r"annotations\[1\] must have id, image_id, category_id, bbox, got"),
        (lambda c: c["images"][1].update(file_name="gone.png"), "image 2 is missing: there is no .*gone.png"),
        (lambda c: c["images"][1].update(file_name="000000.png"), "several images have the file_name 000000.png"),
        (lambda c: c["images"][1].update(file_name="/etc/passwd"), "not within"),
        (lambda c: c["images"][1].update(width="96"), "image 2 must have file_name as text"),
        (lambda c: c["annotations"][1].update(image_id="1"), "annotation 2 names image '1'"),
        (lambda c: c["annotations"][1].update(iscrowd="0"), "annotation 2: iscrowd must be 0 or 1, got '0'"),
        (lambda c: c["categories"].pop(), "train.json must have the categories of .*val.json"),
        (lambda c: c.pop("images"), "has no list 'images'"),
        (lambda c: (c["images"].clear(), c["annotations"].clear()), "no images"),
    ],
)
def test_invalid_annotations_raise(folder, change, message):
    edit_annotations(folder, change)
    with pytest.raises(ValueError, match=message):
        read_coco(folder)


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100_000])
def test_unreadable_annotations_raise(folder, text):
    (folder / "annotations/train.json").write_text(text)
    with pytest.raises(ValueError, match=r"train\.json"):
        read_coco(folder)
    (folder / "annotations/train.json").unlink()
    with pytest.raises(ValueError, match=r"train\.json: no such file"):
        read_coco(folder)


def test_all_faults_of_an_annotation_file_are_in_one_message(folder):
    for name in ("000002.png", "000004.png"):
        (folder / "images/train" / name).unlink()
    edit_annotations(folder, lambda content: content["annotations"][1].update(category_id=77))
    edit_annotations(folder, lambda content: content["annotations"][2].update(bbox=[1, 2]))
    with pytest.raises(ValueError, match=r"there is no .*000002\.png\.\n.*there is no .*000004\.png\.\n") as error:
        read_coco(folder)
    assert "annotation 2 names category 77" in str(error.value)
    assert "annotation 3: bbox must be four finite numbers x y width height, got [1, 2]." in str(error.value)
    assert str(error.value).endswith("train.json: 4 faults.")


def test_an_image_of_another_size_raises(folder):
    edit_annotations(folder, lambda c: c["images"][0].update(width=640))
    with pytest.raises(ValueError, match=r"000000\.png: is 96 x 96, but its annotations state \(640, 96\)"):
        read_coco(folder).datasets["train"][0]


def test_category_ids_with_holes_are_mapped(folder):
    for split in ("train", "val"):
        file = folder / f"annotations/{split}.json"
        content = json.loads(file.read_text())
        for entry in content["categories"]:
            entry["id"] = 90 - 7 * entry["id"]
        for entry in content["annotations"]:
            entry["category_id"] = 90 - 7 * entry["category_id"]
        content["categories"].reverse()
        file.write_text(json.dumps(content))
    before, after = read_yolo(folder), read_coco(folder)
    assert after.class_names == before.class_names[::-1]
    for i in range(6):
        labels = before.datasets["train"][i][1]["labels"]
        assert torch.equal(after.datasets["train"][i][1]["labels"], len(before.class_names) - 1 - labels)


def test_crowds_are_ignored_in_evaluation_and_absent_in_training(folder):
    shutil.copy(folder / "annotations/val.json", folder / "annotations/train.json")
    edit_annotations(folder, lambda c: c["annotations"][0].update(iscrowd=1))
    shutil.copy(folder / "annotations/train.json", folder / "annotations/val.json")
    module = read_coco(folder, **coco_files("val", "val"))
    train, val = module.datasets["train"][0][1], module.datasets["val"][0][1]
    assert val["iscrowd"].tolist() == [1] + [0] * (len(val["labels"]) - 1)
    assert len(train["labels"]) == len(val["labels"]) - 1


@pytest.mark.parametrize("form", ["text", "counts", "pixels"])
def test_each_form_of_coco_masks_equals_the_drawn_ones(folder, form):
    def rewrite(content):
        for entry in content["annotations"]:
            mask = draw_mask(entry["segmentation"], 96, 96)
            if form == "text":
                entry["segmentation"] = encode_run_lengths(mask)
            elif form == "counts":  # by columns, zeros first
                flat = mask.T.flatten()
                edges = np.flatnonzero(np.diff(flat, prepend=0))
                counts = np.diff(edges, prepend=0, append=flat.size).tolist()
                entry["segmentation"] = {"size": [96, 96], "counts": counts}
            elif form == "pixels":  # a polygon around each pixel
                entry["segmentation"] = [
                    [x, y, x + 1, y, x + 1, y + 1, x, y + 1]
                    for y, x in zip(*map(np.ndarray.tolist, mask.nonzero()), strict=True)
                ]

    edit_annotations(folder, rewrite)
    drawn = ShapesDataModule(size=96, **STILL)
    drawn.setup("fit")
    read = read_coco(folder, annotation="masks")
    assert all(same_masks(read.datasets["train"][i], drawn.datasets["train"][i]) for i in range(6))


def test_polygons_are_drawn_at_their_position(folder):
    def rewrite(content):
        content["annotations"][0].update(bbox=[10, 20, 30, 40], segmentation=[[10, 20, 40, 20, 40, 60, 10, 60]])

    edit_annotations(folder, rewrite)
    mask = read_coco(folder, annotation="masks").datasets["train"][0][1]["masks"][0]
    expected = torch.zeros(96, 96, dtype=torch.bool)
    expected[20:60, 10:40] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], "is empty"),
        (None, "is neither a list of polygons nor run lengths"),
        ([1, 2, 3, 4, 5, 6], "is one list of numbers; expected a list of polygons"),
        ({"size": [96, 96], "counts": [9216]}, "covers no pixel"),
        ([[10, 10, 20, 20, 30, 30]], "has no area"),
        ([[1, 2, 3, 4]], "has a polygon of 4 numbers; expected an even count of at least 6"),
        ([[1, 2, 3, 4, 5, 6, 7]], "has a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "has a polygon of 6 numbers; .*finite"),
        ([[1, 2, 3, 4, 5, "6"]], "has a polygon of 6 numbers"),
        ([[1, 2, 300, 4, 5, 6]], "has a polygon that is not within the image of 96 x 96"),
        ({"size": [96, 64], "counts": [6144]}, r"has the size \[96, 64\], but its image \[height, width\] \[96, 96\]"),
        ({"size": [96, 96], "counts": [1, 2, 3]}, "has run lengths that sum to 6 pixels, but its image has 9216"),
        ({"size": [96, 96], "counts": [9217, -1]}, "has run lengths that are not all integers of at least 0"),
        ({"size": [96, 96], "counts": "abc"}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": ""}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": "\u00ff\u00fe"}, "has damaged run lengths"),
        ({"size": [96, 96], "counts": 5}, "has counts that are neither"),
    ],
)
def test_damaged_masks_raise_with_file_and_annotation(folder, caplog, segmentation, message):
    edit_annotations(folder, lambda content: content["annotations"][1].update(segmentation=segmentation))
    with pytest.raises(ValueError, match=f"train.json: annotation 2: segmentation {message}"):
        read_coco(folder, annotation="masks")
    assert "masks" not in read_coco(folder).datasets["train"][0][1], "boxes alone are as they were"
    module = read_coco(folder, annotation="masks", bad_boxes="drop")
    assert "dropped 1 objects" in caplog.text
    content = json.loads((folder / "annotations/train.json").read_text())
    kept = sum(len(module.datasets["train"][i][1]["labels"]) for i in range(6))
    assert kept == len(content["annotations"]) - 1


def test_annotations_without_masks_raise(folder):
    edit_annotations(folder, lambda content: content["annotations"][1].pop("segmentation"))
    with pytest.raises(ValueError, match="annotation 2 has no segmentation, but masks are needed"):
        read_coco(folder, annotation="masks")


def test_masks_are_augmented_with_their_boxes(folder):
    module = read_coco(folder, annotation="masks", flip=0.5, crop=1.0)
    torch.manual_seed(0)
    for i in range(24):
        image, target = module.datasets["train"][i % 6]
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x1, y1, x2, y2 = box.round().int().tolist()
            assert mask[y1:y2, x1:x2].sum() == mask.sum(), "the box encloses the mask"
