"""Images to predict on."""

import pytest
import torch
from PIL import Image

from shunted_lit.data import ImagesDataModule


def load_images(folder, **options):
    module = ImagesDataModule(str(folder), num_workers=0, **options)
    module.setup("predict")
    return module


def test_images_come_in_order_at_their_own_or_the_training_size(tmp_path):
    for name, size in (("b", (30, 20)), ("a", (50, 40))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    module = load_images(tmp_path, batch_size=2)
    (images, indices), = module.predict_dataloader()  # fmt: skip
    assert module.names == ["a", "b"]
    assert indices == [0, 1]
    assert [image.shape for image in images] == [(3, 40, 50), (3, 20, 30)]
    assert images[0][:, 0, 0].tolist() == [1, 0, 0]
    (images, indices), = load_images(tmp_path, batch_size=2, image_size=16).predict_dataloader()  # fmt: skip
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.uint8
    assert load_images(tmp_path / "b.png").names == ["b"]


def test_images_of_other_formats_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.GIF"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.pdf").write_text("no image")
    assert load_images(tmp_path).names == ["a"]
    assert "(1 .gif, 1 .GIF)" in caplog.text


def test_unusable_folders_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"no images .* end in"):
        load_images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"/a: .* several suffixes; rename or move"):
        load_images(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        list(load_images(tmp_path).predict_dataloader())
    with pytest.raises(ValueError, match=r"ImagesDataModule .* fit"):
        ImagesDataModule(str(tmp_path)).setup("fit")
