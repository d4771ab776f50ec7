"""Prediction on slices, with a detector that finds each bright rectangle of an image, and with trained networks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from shunted_lit.models.detectors import build_detector, detect
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.models.sliced_detection import detect_in_slices
from shunted_lit.utils.slices import Slices


def find_rectangles(images):
    """Return the box, label and score of each bright rectangle: red is the label, green the score, in tenths."""
    predictions = []
    for image in images:
        found, _ = ndimage.label(image[2].numpy() > 0)
        boxes = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(found)]
        colours = [(image[:, y1, x1] * 10).round() for x1, y1, _, _ in boxes]
        masks = [torch.from_numpy(found == i + 1) for i in range(len(boxes))]
        predictions.append({
            "boxes": torch.tensor(boxes).float().reshape(-1, 4),
            "labels": torch.tensor([int(colour[0]) for colour in colours], dtype=torch.int64),
            "scores": torch.tensor([float(colour[1]) / 10 for colour in colours]),
            "masks": torch.stack(masks) if masks else torch.zeros(0, *image.shape[-2:], dtype=torch.bool),
        })  # fmt: skip
    return predictions


def paint(boxes, height, width, label=3, score=7):
    image = torch.zeros(3, height, width)
    for x1, y1, x2, y2 in boxes:
        image[:, y1:y2, x1:x2] = torch.tensor([label / 10, score / 10, 1.0])[:, None, None]
    return image


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 200), st.floats(0, 0.95))
def test_windows_cover_a_side_with_the_overlap_and_no_more_than_needed(length, size, overlap):
    starts = Slices(size, overlap).starts(length)
    assert starts[0] == 0
    assert min(starts[-1] + size, length) == length
    if length <= size:
        assert starts == [0]
        return
    assert starts[-1] + size == length
    steps = [b - a for a, b in itertools.pairwise(starts)]
    assert min(steps) > 0
    assert max(steps) <= max(1, int(size * (1 - overlap)))
    assert len(starts) == 1 + -(-(length - size) // max(1, int(size * (1 - overlap))))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_each_object_that_fits_the_overlap_is_found_once_and_whole(data):
    height, width = data.draw(st.integers(40, 150)), data.draw(st.integers(40, 150))
    slices = Slices(data.draw(st.integers(40, 90)), data.draw(st.sampled_from([0.3, 0.5])))
    largest = int(slices.size * slices.overlap)
    boxes = []
    for _ in range(data.draw(st.integers(0, 12))):
        w, h = data.draw(st.integers(2, largest)), data.draw(st.integers(2, largest))
        x, y = data.draw(st.integers(0, width - w)), data.draw(st.integers(0, height - h))
        box = (x, y, x + w, y + h)
        if all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in boxes):
            boxes.append(box)
    found = detect_in_slices(find_rectangles, paint(boxes, height, width), slices)
    assert sorted(map(tuple, found["boxes"].int().tolist())) == sorted(boxes)
    assert found["labels"].tolist() == [3] * len(boxes)
    for box, mask in zip(found["boxes"].int().tolist(), found["masks"], strict=True):
        assert torch.equal(mask, paint([box], height, width)[2] > 0)


def test_objects_of_other_classes_and_neighbours_in_a_window_stay():
    """The window holds all four; each detector has its own rule for overlaps within a window."""
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 30, 30], [12, 10, 32, 30], [70, 10, 90, 30]])

    def detector(images):
        first = images[0][0, 0, 0] == 0
        count = 3 if first else 0
        return [{"boxes": boxes[:count], "labels": torch.tensor([1, 2, 1])[:count], "scores": torch.rand(3)[:count]}]

    image = torch.ones(3, 40, 100)
    image[:, 0, 0] = 0
    found = detect_in_slices(detector, image, Slices(60, 0.2))
    assert len(found["boxes"]) == 3
    assert found["scores"].tolist() == sorted(found["scores"].tolist(), reverse=True)


def test_a_part_of_an_object_gives_way_to_the_whole_even_with_a_higher_score():
    def detector(images):
        prediction = find_rectangles(images)[0]
        width = prediction["boxes"][:, 2] - prediction["boxes"][:, 0]
        return [{**prediction, "scores": torch.where(width < 20, 0.9, 0.5)}]

    found = detect_in_slices(detector, paint([(45, 10, 65, 30)], 40, 110), Slices(60, 0.5))
    assert found["boxes"].tolist() == [[45, 10, 65, 30]]


@pytest.mark.parametrize("name", ["fcos", "mask_rcnn"])
def test_one_window_gives_the_result_without_slices(name):
    torch.manual_seed(0)
    features = FeaturePath("test_resnet")
    options = {"box_score_thresh": 0.0} if name == "mask_rcnn" else {"score_thresh": 0.0}
    detector = build_detector(name, features, 3, pyramid_channels=32, min_size=64, max_size=128,
                              extra_levels=1 if name == "mask_rcnn" else 2, **options).eval()  # fmt: skip
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 64)]
    with torch.no_grad():
        plain, sliced = detect(detector, images), detect(detector, images, Slices(96))
    assert len(plain[0]["boxes"]) > 3
    for one, other in zip(plain, sliced, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    with torch.no_grad():
        halves = detect(detector, images[:1], Slices(64, 0.5))[0]
    assert (halves["boxes"] <= torch.tensor([96.0, 64, 96, 64])).all()
    assert (halves["boxes"][:, 2] > 64).any(), "in the right window"
    if name == "mask_rcnn":
        assert halves["masks"].shape[1:] == (64, 96)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "`slices` must be at least 1, got 0"),
        ({"size": 64, "overlap": 1.0}, "`overlap` must be at least 0 and below 1, got 1.0"),
        ({"size": 64, "overlap": -0.1}, "`overlap` must be at least 0 and below 1, got -0.1"),
        ({"size": 64, "overlap": float("nan")}, "`overlap` must be at least 0 and below 1, got nan"),
    ],
)
def test_impossible_slices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Slices(**options)
