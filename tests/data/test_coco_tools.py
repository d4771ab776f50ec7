"""COCO files that `shunted-lit scenes` writes, as pycocotools, torchvision and supervision read them."""

import json

import numpy as np
import pytest
import supervision
import torch
from helpers.readers import STILL, read_coco, same_masks
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from torch.nn import functional as F
from torchvision.datasets import CocoDetection

from shunted_lit.data import ShapesDataModule
from shunted_lit.data.masks import trace_polygons
from shunted_lit.data.scenes import digit_scenes, write_scenes


def draw_polygons(polygons, height, width):
    """Return the union of polygons, a mask (H, W), as the usual conversion by pycocotools draws it."""
    return coco_mask.decode(coco_mask.frPyObjects(polygons, height, width)).any(axis=2)


def dilate(masks):
    """Add the eight neighbours of each pixel to masks (n, H, W)."""
    return F.max_pool2d(torch.from_numpy(masks).float(), 3, stride=1, padding=1).bool().numpy()


@pytest.fixture(scope="module")
def drawn():
    module = ShapesDataModule(size=96, **STILL)
    module.setup("fit")
    return module.datasets["train"]


def test_objects_are_polygons_as_in_published_files(scenes):
    content = json.loads((scenes / "annotations/train.json").read_text())
    assert content.keys() == {"info", "licenses", "images", "annotations", "categories"}
    categories = [(entry["id"], entry["supercategory"]) for entry in content["categories"]]
    assert categories == [(number, "shape") for number in range(1, 6)]
    keys = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation"}
    for entry in content["annotations"]:
        assert entry.keys() == keys
        assert entry["iscrowd"] == 0
        for polygon in entry["segmentation"]:
            assert len(polygon) >= 6
            assert all(isinstance(value, float) for value in polygon)


def test_pycocotools_draws_the_same_masks(scenes, drawn):
    coco = COCO(scenes / "annotations/train.json")
    assert len(coco.getCatIds(supNms="shape")) == 5
    for i, image_id in enumerate(coco.getImgIds()):
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        masks = torch.from_numpy(np.stack([coco.annToMask(entry) for entry in annotations])).bool()
        assert torch.equal(masks, drawn[i][1]["masks"])
        assert [entry["area"] for entry in annotations] == masks.sum(dim=(1, 2)).tolist()
        boxes = [coco_mask.toBbox(coco.annToRLE(entry)).tolist() for entry in annotations]
        assert boxes == [entry["bbox"] for entry in annotations]


def test_torchvision_reads_the_same_boxes_and_masks(scenes, drawn):
    """With the conversion that its reference scripts apply to all objects that are no crowd."""
    dataset = CocoDetection(scenes / "images/train", scenes / "annotations/train.json")
    for i, (image, annotations) in enumerate(dataset):
        assert np.array_equal(np.asarray(image), (drawn[i][0] * 255).round().byte().permute(1, 2, 0).numpy())
        masks = [draw_polygons(entry["segmentation"], image.height, image.width) for entry in annotations]
        assert torch.equal(torch.from_numpy(np.stack(masks)), drawn[i][1]["masks"])
        x, y, w, h = torch.tensor([entry["bbox"] for entry in annotations]).float().unbind(1)
        assert torch.equal(torch.stack([x, y, x + w, y + h], dim=1), drawn[i][1]["boxes"])


def test_supervision_reads_the_same_objects(scenes, drawn):
    dataset = supervision.DetectionDataset.from_coco(
        str(scenes / "images/train"), str(scenes / "annotations/train.json"), force_masks=True
    )
    assert dataset.classes == ["circle", "triangle", "square", "star", "cross"]
    for i, (_, _, objects) in enumerate(dataset):
        boxes, labels, masks = (drawn[i][1][key].numpy() for key in ("boxes", "labels", "masks"))
        assert np.array_equal(objects.xyxy, boxes)
        assert np.array_equal(objects.class_id, labels)
        assert (objects.mask <= dilate(masks)).all()  # OpenCV draws integer corners and the outline itself
        assert (masks <= dilate(objects.mask)).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_polygons_keep_parts_and_holes(density):
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(1, 30, 2)) < density
        mask[0, 0] = True
        assert np.array_equal(draw_polygons(trace_polygons(mask), *mask.shape), mask)


def test_each_part_is_a_polygon_and_a_hole_is_not():
    mask = np.zeros((20, 40), dtype=bool)
    mask[2:18, 2:18] = mask[5:9, 25:30] = True
    mask[5:8, 5:8] = mask[11:15, 6:15] = False
    polygons = trace_polygons(mask)
    assert len(polygons) == 2
    assert np.array_equal(draw_polygons(polygons, 20, 40), mask)
    assert len(polygons[1]) == 16, "a rectangle needs no more than the ends of its sides"


def test_digits_with_holes_are_read_as_drawn(tmp_path):
    write_scenes(tmp_path / "digits", kind="digits", train=6, val=1, size=96)
    draw = digit_scenes(96, 8)[1]
    coco = COCO(tmp_path / "digits/annotations/train.json")
    assert len(coco.getCatIds(supNms="digit")) == 10
    read = read_coco(tmp_path / "digits", annotation="masks").datasets["train"]
    for i in range(6):
        _, masks, labels = draw(np.random.default_rng([0, 0, i]), "train")
        assert np.array_equal(read[i][1]["masks"].numpy(), masks)
        annotations = coco.loadAnns(coco.getAnnIds(i + 1))
        assert [entry["category_id"] - 1 for entry in annotations] == labels
        assert all(np.array_equal(coco.annToMask(a), mask) for a, mask in zip(annotations, masks, strict=True))


def test_reader_gives_the_drawn_masks(scenes, drawn):
    read = read_coco(scenes, annotation="masks").datasets["train"]
    assert all(same_masks(read[i], drawn[i]) for i in range(6))
