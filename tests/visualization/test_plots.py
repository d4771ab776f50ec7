"""Pictures of predictions and of the curves of a run."""

import numpy as np
import pytest
import torch
from PIL import Image

from shunted_lit.visualization.plots import (
    class_rgb,
    draw_curves,
    draw_predictions,
    overlay_label_map,
    overlay_masks,
    read_metrics,
    select_visible,
)

BOXES = torch.tensor([[10.0, 10, 50, 50], [12, 10, 52, 50], [60, 60, 80, 80]])
PREDICTION = {"boxes": BOXES, "labels": torch.tensor([0, 1, 2]), "scores": torch.tensor([0.5, 0.9, 0.2])}
NOTHING = {"boxes": BOXES[:0], "labels": torch.empty(0, dtype=torch.long), "scores": torch.empty(0)}


def test_the_best_of_overlapping_boxes_is_visible():
    assert {key: value.tolist() for key, value in select_visible(PREDICTION).items()} == {
        "boxes": [[12, 10, 52, 50]],
        "labels": [1],
        "scores": [pytest.approx(0.9)],
    }
    assert len(select_visible(NOTHING)["boxes"]) == 0


@pytest.mark.parametrize("count", [1, 4])
def test_predictions_are_drawn_for_any_number_of_images(tmp_path, count):
    images = [torch.full((3, 100, 60 + 20 * i), 0.5) for i in range(count)]
    names = ["a", "b", "c"]
    draw_predictions(tmp_path / "empty.png", images, [NOTHING] * count, [NOTHING] * count, names)
    draw_predictions(tmp_path / "full.png", images, [NOTHING] * count, [PREDICTION] * count, names)
    empty, full = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), int) for name in ("empty", "full"))
    assert empty.shape[1] == full.shape[1]
    orange = np.abs(full - [255, 127, 14]).sum(-1) < 12  # matplotlib's C1, of label 1
    assert orange.sum() > 5 * count
    assert (np.abs(full - [44, 160, 44]).sum(-1) < 12).sum() < 50, "label 2 scores too low to be drawn"


def test_label_maps_are_drawn_with_a_legend_of_their_classes(tmp_path):
    label_map = torch.tensor([[1, 255], [3, 3]], dtype=torch.uint8).repeat_interleave(50, 0).repeat_interleave(50, 1)
    draw_predictions(tmp_path / "a.png", [torch.rand(3, 100, 100)], [label_map], [label_map], ["a", "b", "c", "d"])
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"), int)
    for label, is_present in ((0, False), (1, True), (2, False), (3, True)):  # in its colour, without the image below
        assert ((np.abs(pixels - class_rgb(label)).sum(-1) < 12).sum() > 20) == is_present


def test_masks_cover_a_grey_image_and_the_first_one_is_on_top():
    image = torch.tensor([200, 50, 50], dtype=torch.uint8)[:, None, None].expand(3, 1, 4)
    masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]]], dtype=torch.bool)
    before = masks.clone()
    out = overlay_masks(image, masks, [1, 3])
    assert out[:, 0, 3].tolist() == [200, 50, 50], "no mask, no change"
    grey = 0.2989 * 200 + 0.587 * 50 + 0.114 * 50
    for place, label in ((0, 1), (1, 1), (2, 3)):
        expected = [0.6 * value + 0.4 * grey for value in class_rgb(label)]
        assert out[:, 0, place].tolist() == pytest.approx(expected, abs=2)
    assert torch.equal(masks, before)
    label_map = torch.tensor([[1, 255, 3, 3]], dtype=torch.uint8)
    assert torch.equal(overlay_label_map(image, label_map)[:, 0, 2], out[:, 0, 2])
    assert overlay_label_map(image, label_map)[:, 0, 1].tolist() == [200, 50, 50], "255 is no class"


def test_curves_are_drawn_from_a_metrics_csv(tmp_path):
    (tmp_path / "metrics.csv").write_text(
        "epoch,step,train/loss,val/map,val/map_large\n0,9,2.5,,\n0,19,1.5,,\n0,19,,0.25,-1.0\n"
    )
    assert read_metrics(tmp_path / "metrics.csv") == {
        "train/loss": ([9, 19], [2.5, 1.5]),
        "val/map": ([19], [0.25]),
        "val/map_large": ([19], [-1.0]),
    }
    draw_curves(tmp_path / "curves.png", tmp_path / "metrics.csv")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1200, 456)


def test_colours_of_many_classes_differ():
    assert len({class_rgb(label) for label in range(150)}) == 150
