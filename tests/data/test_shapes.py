"""Scenes of shapes, drawn on access, and their augmentation."""

import numpy as np
import pytest
import torch
from helpers.readers import STILL, same_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from shunted_lit.data import ShapesDataModule


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(16, 160), st.integers(1, 12))
def test_boxes_enclose_the_visible_objects(seed, size, max_objects):
    module = ShapesDataModule(size=size, min_extent=4, max_objects=max_objects, seed=seed, **STILL)
    module.setup("fit")
    image, target = module.datasets["train"][0]
    assert image.shape == (3, size, size)
    assert image.dtype == torch.float32
    assert 0 <= image.min() <= image.max() <= 1
    assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
    assert (target["masks"].sum(0) <= 1).all(), "a pixel belongs to one object"
    for box, mask in zip(target["boxes"], target["masks"], strict=True):
        rows, columns = torch.where(mask)
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_scenes_hold_small_and_large_objects_of_every_class():
    module = ShapesDataModule(**STILL)
    module.setup("fit")
    targets = [module.datasets["train"][i][1] for i in range(80)]
    boxes = torch.cat([target["boxes"] for target in targets])
    extents = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    assert extents.min() <= 8
    assert 56 <= extents.max() <= 68
    assert set(torch.cat([target["labels"] for target in targets]).tolist()) == set(range(module.num_classes))


def test_discs_of_related_scenes_have_the_class_of_the_large_shape():
    module = ShapesDataModule(size=96, scenes="related", max_objects=6, annotation="masks", **STILL)
    module.setup("fit")
    found = set()
    for index in range(60):
        _, target = module.datasets["train"][index]
        widths = (target["boxes"][:, 2:] - target["boxes"][:, :2]).amax(1)
        assert widths[0] >= 96 // 3 - 3
        assert (widths[1:] <= 96 // 6 + 1).all()
        assert (target["labels"] == target["labels"][0]).all()
        found.add((int(target["labels"][0]), len(widths) > 1))
        for mask, width in zip(target["masks"][1:], widths[1:], strict=True):
            assert mask.sum() > 0.6 * width**2, "a disc, whatever its class"
    assert {label for label, more in found if more} == set(range(5))


def test_discs_of_lookup_scenes_have_the_bar_of_the_distant_ring_of_their_colour():
    """Read the answer from the pixels: find each disc's colour, that colour's ring, and the direction of its bar."""
    size, seen = 256, set()
    module = ShapesDataModule(size=size, scenes="lookup", max_objects=6, annotation="masks", **STILL)
    module.setup("fit")
    for index in range(20):
        image, target = module.datasets["train"][index]
        objects = target["masks"].any(0)
        for mask, label in zip(target["masks"], target["labels"], strict=True):
            colour = image[:, mask.bool()].median(1).values
            same = (image - colour[:, None, None]).abs().amax(0) < 0.12
            rows, columns = torch.where(same & ~objects & ~grown(objects))
            centre = torch.stack([rows, columns]).float().median(1).values
            near = (torch.stack([rows, columns]).float() - centre[:, None]).abs().amax(0) < 12
            rows, columns = rows[near], columns[near]
            middle = torch.stack([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
            on_row, on_column = (
                (places - place).abs() <= 1 for places, place in zip((rows, columns), middle, strict=True)
            )
            name = "horizontal" if on_row.sum() > on_column.sum() else "vertical"
            assert module.class_names[label] == name
            disc = torch.stack(torch.where(mask)).float().mean(1)
            assert (disc - middle).norm() > size / 3 - 2
            seen.add(name)
    assert seen == set(module.class_names)


def grown(mask):
    """Return a mask grown by a pixel, which covers the smooth edge of an object."""
    return torch.nn.functional.max_pool2d(mask[None].float(), 3, 1, 1)[0] > 0


def test_scenes_depend_on_seed_and_split():
    def first(split, seed):
        module = ShapesDataModule(seed=seed, **STILL)
        module.setup("fit")
        return module.datasets[split][0]

    assert same_sample(first("train", 1), first("train", 1))
    assert not same_sample(first("train", 1), first("train", 2))
    assert not same_sample(first("train", 1), first("val", 1))
    assert not same_sample(first("val", 1), first("train", 2))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"train_size": 0}, "`train_size` must be at least 1, got 0"),
        ({"min_extent": 65}, "`min_extent` must be 1 to 64, half of `size`, got 65"),
        ({"size": 0}, "`min_extent` must be 1 to 0, half of `size`, got 6"),
        ({"scenes": "far"}, "`scenes` must be one of lookup, plain, related, got 'far'"),
        ({"scenes": "lookup", "size": 96}, "`size` must be at least 128, got 96"),
        (
            {"scenes": "lookup", "size": 128, "annotation": "class"},
            "`scenes` must be plain or related for classification",
        ),
    ],
)
def test_invalid_scene_options_raise(keywords, message):
    with pytest.raises(ValueError, match=message):
        ShapesDataModule(**keywords)


def test_flip_moves_boxes_and_masks_with_the_image():
    plain = ShapesDataModule(**STILL)
    mirrored = ShapesDataModule(**{**STILL, "flip": 1.0})
    for module in (plain, mirrored):
        module.setup("fit")
    (image, target), (other, moved) = plain.datasets["train"][3], mirrored.datasets["train"][3]
    assert torch.equal(other, image.flip(2))
    expected = target["boxes"].clone()
    expected[:, [0, 2]] = 128 - target["boxes"][:, [2, 0]]
    assert torch.equal(moved["boxes"], expected)
    assert torch.equal(moved["masks"], target["masks"].flip(2))
    assert same_sample(plain.datasets["val"][3], mirrored.datasets["val"][3]), "evaluation is never augmented"


def test_augmentation_keeps_the_entries_of_a_target_aligned():
    module = ShapesDataModule(num_workers=0, flip=0.5, distort=1.0, crop=1.0)
    module.setup("fit")
    torch.manual_seed(0)
    for i in range(12):
        image, target = module.datasets["train"][i]
        n = len(target["boxes"])
        assert n == len(target["labels"]) == len(target["iscrowd"]) == len(target["masks"])
        height, width = image.shape[-2:]
        assert (target["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_masks_have_the_size_of_the_image():
    module = ShapesDataModule(**STILL)
    module.setup("fit")
    image, target = module.datasets["val"][0]
    assert np.asarray(target["masks"]).shape == (len(target["labels"]), *image.shape[1:])


def test_scenes_for_boxes_have_no_masks():
    masks, boxes = (ShapesDataModule(train_size=2, val_size=2, annotation=kind) for kind in ("masks", "boxes"))
    for data in (masks, boxes):
        data.setup("validate")
    image, target = boxes.datasets["val"][0]
    assert "masks" not in target, "pictures would show them in the truth alone"
    assert same_sample((image, target), masks.datasets["val"][0])


def test_scenes_for_classification_have_one_object():
    module = ShapesDataModule(annotation="class", num_workers=0, batch_size=4)
    module.setup("fit")
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (4, 3, 128, 128)
    assert images.dtype == torch.uint8
    assert labels.shape == (4,)
    assert {module.datasets["train"][i][1] for i in range(40)} == set(range(5))
