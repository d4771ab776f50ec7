"""What the readers of detection data share."""

import shutil

import numpy as np
import pytest
import torch
from helpers.readers import STILL, edit_annotations, read_coco, read_yolo
from PIL import Image

from shunted_lit.data import ShapesDataModule, YoloDataModule


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


@pytest.mark.parametrize("reader", [read_yolo, read_coco])
def test_training_images_are_cut_into_windows_with_their_objects(scenes, reader):
    whole = reader(scenes, annotation="masks") if reader is read_coco else reader(scenes)
    cut = reader(scenes, slices=64, overlap=0.5, annotation=whole.annotation)
    source, dataset = whole.datasets["train"], cut.datasets["train"]
    assert len(dataset) == 4 * len(source), "96 pixels are windows at 0 and 32, both ways"
    assert len(cut.datasets["val"]) == len(whole.datasets["val"])
    assert cut.datasets["val"][0][0].shape[-2:] == (96, 96), "evaluation joins the windows' predictions"
    seen = 0
    for index in range(len(dataset)):
        number, (y, x) = index // 4, divmod(index % 4, 2)
        x1, y1 = 32 * x, 32 * y
        (image, target), (full, truth) = dataset[index], source[number]
        assert torch.equal(image, full[:, y1 : y1 + 64, x1 : x1 + 64])
        assert target["image_id"] == truth["image_id"]
        expected = []
        for i, (left, top, right, bottom) in enumerate(truth["boxes"].tolist()):
            box = [min(max(left - x1, 0), 64), min(max(top - y1, 0), 64),
                   min(max(right - x1, 0), 64), min(max(bottom - y1, 0), 64)]  # fmt: skip
            visible = (box[2] - box[0]) * (box[3] - box[1])
            if visible >= 0.3 * (right - left) * (bottom - top):
                expected.append((box, int(truth["labels"][i]), i))
        assert target["boxes"].tolist() == [pytest.approx(box) for box, _, _ in expected]
        assert target["labels"].tolist() == [label for _, label, _ in expected]
        if "masks" in truth:
            kept = truth["masks"][[i for _, _, i in expected]]
            assert torch.equal(target["masks"], kept[:, y1 : y1 + 64, x1 : x1 + 64])
        seen += len(expected)
    assert seen > source.count_objects()
    assert cut.names_of(0, 0)[0].endswith(":64]") or cut.names_of(0, 0)[0].endswith(":96]")


def test_windows_of_a_damaged_image_are_skipped_as_the_image_would_be(folder):
    (folder / "images/train/000003.png").write_bytes(b"not an image")
    module = YoloDataModule(str(folder / "data.yaml"), **STILL, slices=64, skip_damaged=1, batch_size=30)
    module.prepare_data()
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert len(batch[0]) == 5 * 4 + 1, "the damaged image counts as one window"


def test_windows_larger_than_all_images_are_reported(scenes, caplog):
    assert len(read_yolo(scenes, slices=100).datasets["train"]) == 6
    assert "no training image is larger than `slices`, 100 pixels, so none is cut" in caplog.text


def test_drawn_scenes_are_not_cut():
    module = ShapesDataModule(slices=64)
    with pytest.raises(ValueError, match="`slices` must be null for ShapesDataModule: only image files are cut"):
        module.setup("fit")
