"""What prediction writes, read back by this package's own readers, and by eye of numpy."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from shunted_lit.data import CocoDataModule, ImagesDataModule, MaskFolderDataModule, YoloDataModule
from shunted_lit.prediction.writers import BoxWriter, ClassWriter, MapWriter, PredictionWriter
from shunted_lit.visualization.plots import class_bytes

NAMES = ["cat", "$x$", "bird_{3}"]  # as hard to draw as names can be
MASKS = torch.zeros(3, 40, 60, dtype=torch.bool)
MASKS[0, 5:20, 10:30] = True
MASKS[1, 22:39, 3:50] = True
MASKS[2, :4, :4] = True
FOUND = {
    "boxes": torch.tensor([[10.0, 5, 30, 20], [3, 22, 50, 39], [0, 0, 4, 4]]),
    "labels": torch.tensor([2, 0, 1]),
    "scores": torch.tensor([0.9, 0.5, 0.2]),
    "masks": MASKS,
}


def image():
    return Image.fromarray(np.full((40, 60, 3), 128, np.uint8))


def write(kind, out, predictions, min_score=0.3):
    writer = kind(out, [f"{i}" for i in range(len(predictions))], NAMES, min_score)
    out.mkdir(exist_ok=True)
    records = []
    for i, found in enumerate(predictions):
        kept = writer.keep(found)
        writer.save("pictures", i, writer.draw(pil_to_tensor(image()), kept))
        records.append({"file_name": f"{i}.png", **writer.write(i, (40, 60), kept)})
    return writer.finish(records)


def test_objects_are_read_back_as_they_were(tmp_path):
    nothing = {key: value[:0] for key, value in FOUND.items()}
    assert write(BoxWriter, tmp_path / "out", [FOUND, nothing]) == "2 objects: bird_{3} 1, cat 1"
    (tmp_path / "images").mkdir()
    for i in range(2):
        image().save(tmp_path / f"images/{i}.png")
    files = {"train_images": "images", "train_annotations": "out/predictions.json",
             "val_images": "images", "val_annotations": "out/predictions.json"}  # fmt: skip
    module = CocoDataModule(str(tmp_path), **files, num_workers=0, annotation="masks")
    module.setup("validate")
    target = module.datasets["val"][0][1]
    assert module.class_names == NAMES
    assert target["labels"].tolist() == [2, 0]
    torch.testing.assert_close(target["boxes"], FOUND["boxes"][:2])
    assert torch.equal(target["masks"], MASKS[:2])
    assert len(module.datasets["val"][1][1]["labels"]) == 0
    content = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["score"] for entry in content["annotations"]] == pytest.approx([0.9, 0.5])
    assert [entry["area"] for entry in content["annotations"]] == [300, 17 * 47]

    rows = [line.split() for line in (tmp_path / "out/labels/0.txt").read_text().splitlines()]
    assert [float(row[5]) for row in rows] == pytest.approx([0.9, 0.5])
    assert (tmp_path / "out/labels/1.txt").read_text() == ""
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/0.txt").write_text("".join(" ".join(row[:5]) + "\n" for row in rows))
    (tmp_path / "data.yaml").write_text(json.dumps({"train": "images", "val": "images", "names": NAMES}))
    module = YoloDataModule(str(tmp_path / "data.yaml"), num_workers=0)
    module.setup("validate")
    torch.testing.assert_close(module.datasets["val"][0][1]["boxes"], FOUND["boxes"][:2], rtol=0, atol=1e-3)


def test_boxes_without_masks_are_written_too(tmp_path):
    found = {key: value for key, value in FOUND.items() if key != "masks"}
    write(BoxWriter, tmp_path / "out", [found], min_score=0.0)
    annotations = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    assert len(annotations) == 3
    assert "segmentation" not in annotations[0]
    assert annotations[0]["area"] == 300


def test_pictures_show_masks_boxes_and_a_legend(tmp_path):
    write(BoxWriter, tmp_path / "out", [FOUND])
    with Image.open(tmp_path / "out/pictures/0.png") as picture:
        pixels = np.asarray(picture).astype(int)
    times = 480 // 60
    assert pixels.shape[1] == 480
    assert pixels.shape[0] > 40 * times, "a legend below"
    blend = 0.6 * np.array(class_bytes(2)) + 0.4 * 128
    inside = pixels[12 * times + 4, 20 * times + 4]
    assert np.abs(inside - blend).max() <= 2, "the mask, over the image"
    edge = pixels[12 * times : 14 * times, 30 * times - 1 : 30 * times + 2]
    assert (np.abs(edge - class_bytes(2)).sum(-1) == 0).any(), "the box"
    assert (pixels[2 * times, 2 * times] == 128).all(), "0.2 is not drawn"
    legend = pixels[40 * times :]
    for label in (0, 2):
        assert (np.abs(legend - class_bytes(label)).sum(-1) == 0).sum() > 50


def test_label_maps_are_read_back_as_they_were(tmp_path):
    label_map = torch.zeros(40, 60, dtype=torch.long)
    label_map[:10] = 2
    told = write(MapWriter, tmp_path / "out", [label_map])
    assert told == "2 classes: cat 75.0%, bird_{3} 25.0%"
    (tmp_path / "images").mkdir()
    image().save(tmp_path / "images/0.png")
    folders = {"train_images": "images", "train_masks": "out/masks", "val_images": "images", "val_masks": "out/masks"}
    names = (tmp_path / "out/classes.txt").read_text().splitlines()
    module = MaskFolderDataModule(str(tmp_path), names=names, **folders, num_workers=0)
    module.setup("validate")
    assert names == NAMES
    assert torch.equal(module.datasets["val"][0][1].long(), label_map)
    with Image.open(tmp_path / "out/masks/0.png") as mask:
        assert mask.convert("RGB").getpixel((0, 0)) == class_bytes(2)
    with Image.open(tmp_path / "out/pictures/0.png") as picture:
        blend = [0.6 * part + 0.4 * 128 for part in class_bytes(0)]
        assert np.abs(np.array(picture.getpixel((240, 240))) - blend).max() <= 2


def test_classes_are_a_table(tmp_path):
    told = write(ClassWriter, tmp_path / "out", [torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.5, 0.1, 0.4])])
    assert told == "$x$ 1, cat 1"
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["$x$", "cat"]
    assert [float(row["probability"]) for row in rows] == pytest.approx([0.7, 0.5])
    assert [row["class3"] for row in rows] == ["bird_{3}", "$x$"]
    assert {path.name for path in (tmp_path / "out/pictures").iterdir()} == {"0.png", "1.png"}


def test_files_of_others_are_not_mixed_in(tmp_path):
    write(ClassWriter, tmp_path / "out", [torch.tensor([0.2, 0.7, 0.1])])
    ClassWriter(tmp_path / "out", ["0"], NAMES, 0.3).forbid_others()
    with pytest.raises(ValueError, match=r"predictions.csv: is in the folder .* \(1 such files\); name another folder"):
        MapWriter(tmp_path / "out", ["0"], NAMES, 0.3).forbid_others()
    with pytest.raises(ValueError, match=r"pictures/0.png: is in the folder"):
        ClassWriter(tmp_path / "out", ["other"], NAMES, 0.3).forbid_others()


def test_colours_of_many_classes_keep_apart():
    colours = [class_bytes(label) for label in range(150)]
    assert len(set(colours)) == 150


# --- the images


def images(folder, **keywords):
    module = ImagesDataModule(str(folder), num_workers=0, **keywords)
    module.setup("predict")
    return module


def test_images_come_in_order_in_their_own_size_or_prepared(tmp_path):
    for name, size in (("b", (30, 20)), ("a", (50, 40))):
        Image.new("RGB", size, (255, 0, 0)).save(tmp_path / f"{name}.png")
    module = images(tmp_path, batch_size=2)
    (pictures, numbers), = module.predict_dataloader()  # fmt: skip
    assert module.names == ["a", "b"]
    assert numbers == [0, 1]
    assert [picture.shape for picture in pictures] == [(3, 40, 50), (3, 20, 30)]
    assert pictures[0][:, 0, 0].tolist() == [1, 0, 0]
    (pictures, numbers), = images(tmp_path, batch_size=2, image_size=16).predict_dataloader()  # fmt: skip
    assert pictures.shape == (2, 3, 16, 16)
    assert pictures.dtype == torch.uint8
    assert images(tmp_path / "b.png").names == ["b"]


def test_images_of_other_formats_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.gif", "c.GIF"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.pdf").write_text("no image that can be read")
    assert images(tmp_path).names == ["a"]
    assert "skipping images in unsupported formats (1 .gif, 1 .GIF)" in caplog.text


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"no images found; their names must end in"):
        images(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 9)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a: exists with several suffixes; rename or move all but one"):
        images(tmp_path)
    (tmp_path / "a.jpg").unlink()
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"b\.png: not a readable image"):
        list(images(tmp_path).predict_dataloader())
    with pytest.raises(ValueError, match="min_score is 2"):
        PredictionWriter(min_score=2)
    with pytest.raises(ValueError, match="has no labels and is only for predict, not fit"):
        ImagesDataModule(str(tmp_path)).setup("fit")
