"""What the readers of detection data share."""

import shutil

import numpy as np
import pytest
from helpers.readers import edit_annotations, read_coco, read_yolo
from PIL import Image


def test_a_batch_is_two_lists(scenes):
    images, targets = next(iter(read_yolo(scenes, batch_size=2).val_dataloader()))
    assert [image.shape for image in images] == [(3, 96, 96)] * 2
    assert [target["image_id"] for target in targets] == [0, 1]


@pytest.mark.parametrize("reader", [read_yolo, read_coco])
def test_data_without_any_object_raise(folder, reader):
    shutil.rmtree(folder / "labels")
    edit_annotations(folder, lambda c: c["annotations"].clear())
    with pytest.raises(ValueError, match="none of the 6 images has an object"):
        reader(folder)


@pytest.mark.parametrize("reader", [read_yolo, read_coco])
def test_a_missing_image_raises(folder, reader):
    (folder / "images/train/000003.png").unlink()
    with pytest.raises(ValueError, match=r"000003\.(txt: no image in .* belongs to these labels|png)"):
        reader(folder)


@pytest.mark.parametrize(
    ("reader", "content", "workers"),
    [(reader, content, 0) for reader in (read_yolo, read_coco) for content in (b"", b"not an image", "half")]
    + [pytest.param(read_yolo, "half", 1, marks=pytest.mark.slow)],
)
def test_an_unreadable_image_raises(folder, reader, content, workers):
    path = folder / "images/train/000003.png"
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    module = reader(folder, num_workers=workers)
    with pytest.raises(ValueError, match=r"000003\.png: not a readable image"):
        list(module.train_dataloader())


def test_images_are_read_upright_and_16_bits_are_scaled(folder):
    path = folder / "images/train/000000.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(path, exif=exif)
    assert read_yolo(folder).datasets["train"][0][0].shape == (3, 64, 32)
    ramp = np.linspace(0, 65535, 64 * 32).reshape(32, 64).astype(np.uint16)
    Image.fromarray(ramp).save(path)
    image = read_yolo(folder).datasets["train"][0][0]
    assert image.mean().item() == pytest.approx(0.5, abs=0.01)


def test_grey_and_transparent_images_become_rgb(folder):
    for number, mode in enumerate(("L", "RGBA", "P", "1")):
        Image.new(mode, (40, 30)).save(folder / f"images/train/{number:06d}.png")
        assert read_yolo(folder).datasets["train"][number][0].shape == (3, 30, 40)


def test_an_annotation_that_is_not_offered_raises(folder):
    with pytest.raises(ValueError, match="`annotation` of YoloDataModule must be boxes or masks, got 'map'; choose "):
        read_yolo(folder, annotation="map")
