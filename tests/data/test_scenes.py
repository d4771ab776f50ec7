"""Scenes written to disk."""

import pytest
import torch
from helpers.readers import STILL, read_coco, read_yolo, same_sample

from shunted_lit.data import ShapesDataModule
from shunted_lit.data.scenes import write_scenes


def test_yolo_and_coco_readers_agree(scenes):
    a, b = read_yolo(scenes), read_coco(scenes)
    assert a.class_names == b.class_names
    for split, count in (("train", 6), ("val", 3)):
        assert len(a.datasets[split]) == len(b.datasets[split]) == count
        assert all(same_sample(a.datasets[split][i], b.datasets[split][i]) for i in range(count))


def test_written_boxes_equal_the_drawn_ones(scenes):
    drawn = ShapesDataModule(size=96, **STILL)
    drawn.setup("fit")
    assert all(same_sample(read_yolo(scenes).datasets["train"][i], drawn.datasets["train"][i]) for i in range(6))


def test_digit_scenes_have_boxes_of_ten_classes(tmp_path):
    write_scenes(tmp_path / "digits", kind="digits", train=4, val=4, size=128)
    module = read_yolo(tmp_path / "digits")
    assert module.class_names == [str(digit) for digit in range(10)]
    boxes = torch.cat([module.datasets["train"][i][1]["boxes"] for i in range(4)])
    assert len(boxes)
    assert ((boxes[:, 2:] - boxes[:, :2]).amax(1) <= 98).all()


def test_scenes_are_not_overwritten(scenes):
    with pytest.raises(ValueError, match="already exists and is not empty; choose a new folder"):
        write_scenes(scenes)
