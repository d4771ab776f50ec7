"""Images with a class for each pixel: both layouts, augmentation, and damaged files."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from shunted_lit.data import ADE20KDataModule, MaskFolderDataModule, ShapesDataModule

STILL = {"num_workers": 0, "flip": 0.0, "distort": 0.0, "short_side": None, "crop_size": 96}


def read_masks(folder, **options):
    module = MaskFolderDataModule(str(folder), **{**STILL, **options})
    module.setup("fit")
    return module


def read_ade20k(folder, **options):
    module = ADE20KDataModule(str(folder), **{**STILL, **options})
    module.setup("fit")
    return module


def write_ade20k(folder, values, size=(40, 50)):
    for split in ("training", "validation"):
        for i, value in enumerate(values):
            for kind, suffix, content in (
                ("images", "jpg", np.full((*size, 3), 90, np.uint8)),
                ("annotations", "png", np.full(size, value, np.uint8)),
            ):
                path = folder / kind / split / f"ADE_{i:08d}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return folder


def test_masks_equal_the_drawn_label_maps(scenes):
    module, drawn = read_masks(scenes), ShapesDataModule(size=96, num_workers=0, flip=0, annotation="map")
    drawn.setup("fit")
    assert module.class_names == drawn.class_names == ["background", "circle", "triangle", "square", "star", "cross"]
    for split, count in (("train", 6), ("val", 3)):
        assert len(module.datasets[split]) == count
        for i in range(count):
            (image, label_map), (other, true_map) = module.datasets[split][i], drawn.datasets[split][i]
            assert torch.equal(image, other)
            assert torch.equal(label_map, true_map)
            assert label_map.dtype == torch.uint8
    images, maps = next(iter(module.val_dataloader()))
    assert [image.shape for image in images] == [(3, 96, 96)] * 3
    assert images[0].dtype == torch.float32
    assert len(maps) == 3


def test_label_maps_agree_with_the_masks_of_a_scene():
    both = [ShapesDataModule(num_workers=0, flip=0, annotation=kind) for kind in ("map", "masks")]
    for module in both:
        module.setup("fit")
    for i in range(5):
        (image, label_map), (other, target) = (module.datasets["val"][i] for module in both)
        assert torch.equal(image, other)
        for label, mask in zip(target["labels"], target["masks"], strict=True):
            assert (label_map[mask] == label + 1).all()
        assert (label_map[~target["masks"].any(0)] == 0).all()


def test_published_ade20k_layout_is_read(tmp_path, caplog):
    folder = write_ade20k(tmp_path, (0, 1, 150, 7))
    with caplog.at_level(logging.WARNING):
        module = read_ade20k(folder)
    assert module.class_names == [str(number) for number in range(150)]
    assert "objectInfo150.txt: no such file" in caplog.text
    values = [module.datasets["val"][i][1].unique().tolist() for i in range(4)]
    assert values == [[255], [0], [149], [6]]
    lines = [f"{i}\t0.1\t10\t2\t1\tname {i}, other" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *lines]))
    assert read_ade20k(folder).class_names[:2] == ["name 1", "name 2"]
    (folder / "objectInfo150.txt").write_text("\n".join(lines[:100]))
    with pytest.raises(ValueError, match=r"Info150.txt: expected a line for each class from 1 to 150, got 100 classes"):
        read_ade20k(folder)


@pytest.mark.parametrize("size", [(40, 50), (200, 90)])
def test_training_crops_have_one_size_and_aligned_maps(tmp_path, size):
    folder = tmp_path
    for kind, channels in (("images", 3), ("masks", 0)):
        for split in ("train", "val"):
            (folder / kind / split).mkdir(parents=True)
            pixels = np.zeros((*size, 3) if channels else size, np.uint8)
            pixels[: size[0] // 2] = 200 if channels else 1
            Image.fromarray(pixels).save(folder / kind / split / "a.png")
    module = MaskFolderDataModule(
        str(folder), names=["dark", "light"], num_workers=0, crop_size=64, short_side=48, distort=0.0
    )
    module.setup("fit")
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        image, label_map = module.datasets["train"][0]
        assert image.shape == (3, 64, 64)
        assert label_map.shape == (64, 64)
        values = label_map.unique().tolist()
        assert set(values) <= {0, 1, 255}
        seen |= set(values)
        light, dark = image[0] > 0.6, image[0] < 0.2
        inside = label_map != 255
        is_right = (light & (label_map == 1)) | (dark & (label_map == 0))
        assert is_right[inside].float().mean() > 0.95, "except at smoothed edges"
        if (~inside).any():
            assert image[:, ~inside].mean(1).tolist() == pytest.approx([124 / 255, 116 / 255, 104 / 255], abs=0.02)
    assert seen == {0, 1, 255}
    assert module.datasets["val"][0][0].shape == (3, *size), "evaluation keeps the size"


def test_palette_masks_are_read_by_colour_index(scenes, folder):
    for path in (folder / "masks/train").iterdir():
        with Image.open(path) as mask:
            values = np.asarray(mask)
        palette = Image.fromarray(values, mode="P")
        palette.putpalette([17 * i % 256 for i in range(768)])
        palette.save(path)
    plain, coloured = read_masks(scenes), read_masks(folder)
    assert torch.equal(plain.datasets["train"][0][1], coloured.datasets["train"][0][1])


def test_missing_masks_and_images_raise_and_are_counted(folder):
    for i in (1, 3, 5):
        (folder / f"masks/train/{i:06d}.png").unlink()
    with pytest.raises(
        ValueError, match=r"(?s)train/000001.png: has no mask in .*; each image needs .*train: 3 faults\."
    ):
        read_masks(folder)
    for i in (1, 3, 5):
        (folder / f"images/train/{i:06d}.png").unlink()
    assert len(read_masks(folder).datasets["train"]) == 3
    (folder / "images/train/000000.png").unlink()
    with pytest.raises(ValueError, match=r"masks/train/000000.png: has no image in "):
        read_masks(folder)


def test_two_images_with_one_name_raise(folder):
    shutil.copy(folder / "images/train/000000.png", folder / "images/train/000000.jpg")
    with pytest.raises(ValueError, match=r"images/train: 000000 exists with several suffixes; keep one"):
        read_masks(folder)


def test_a_mask_of_another_size_raises(folder):
    Image.new("L", (32, 16)).save(folder / "masks/train/000002.png")
    with pytest.raises(ValueError, match=r"000002.png: is 32 x 16, but its image 000002.png is 96 x 96"):
        list(read_masks(folder).train_dataloader())


def test_values_beyond_the_classes_raise_and_are_counted(folder):
    values = np.zeros((96, 96), np.uint8)
    values[:2], values[5, :3], values[9] = 17, 200, 255
    Image.fromarray(values).save(folder / "masks/train/000002.png")
    message = r"02.png: has 2 values that are no class: 17 \(192 pixels\), 200 \(3 pixels\); 0 to 5 are classes, 255"
    with pytest.raises(ValueError, match=message):
        list(read_masks(folder).train_dataloader())
    ade = write_ade20k(folder / "ade", (151,))
    with pytest.raises(ValueError, match=r"151 \(2000 pixels\); 1 to 150 are classes, 255 and 0 are no class"):
        list(read_ade20k(ade).train_dataloader())


@pytest.mark.parametrize(
    ("content", "workers"),
    [(b"", 0), (b"not an image", 0), ("colours", 0), pytest.param("colours", 1, marks=pytest.mark.slow)],
)
def test_unreadable_masks_raise(folder, content, workers):
    path = folder / "masks/train/000002.png"
    if content == "colours":
        Image.new("RGB", (64, 64)).save(path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"000002.png: not a readable mask"):
        list(read_masks(folder, num_workers=workers).train_dataloader())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["one"]}, "`names` must hold 2 to 255 names, got 1"),
        ({"train_masks": "none"}, "none: no such folder"),
        ({"val_images": "labels/val"}, "labels/val: no files found; their names must end in"),
        ({"crop_size": 0}, "`crop_size` must be at least 1, got 0"),
        ({"scale": (2.0, 1.0)}, "`scale` must be two numbers above 0 in ascending order, got 2.0 and 1.0"),
    ],
)
def test_invalid_options_raise(folder, change, message):
    with pytest.raises(ValueError, match=message):
        read_masks(folder, **change)


def test_class_names_must_exist_and_differ(folder):
    (folder / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match=r"classes.txt: has the name 'a' twice"):
        read_masks(folder)
    (folder / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"classes.txt: no such file; write one class name per line, or set `names`"):
        read_masks(folder)
