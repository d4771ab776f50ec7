"""Files written by `predict`, read back by this package's own readers, and their pixels."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from shunted_lit.data import CocoDataModule, MaskFolderDataModule, YoloDataModule
from shunted_lit.prediction.writers import BoxWriter, ClassWriter, MapWriter, PredictionWriter
from shunted_lit.visualization.plots import class_rgb

NAMES = ["cat", "$x$", "bird_{3}"]  # with characters that matplotlib would take for formulas
MASKS = torch.zeros(3, 40, 60, dtype=torch.bool)
MASKS[0, 5:20, 10:30] = True
MASKS[1, 22:39, 3:50] = True
MASKS[2, :4, :4] = True
PREDICTION = {
    "boxes": torch.tensor([[10.0, 5, 30, 20], [3, 22, 50, 39], [0, 0, 4, 4]]),
    "labels": torch.tensor([2, 0, 1]),
    "scores": torch.tensor([0.9, 0.5, 0.2]),
    "masks": MASKS,
}


def grey_image():
    return Image.fromarray(np.full((40, 60, 3), 128, np.uint8))


def write_predictions(kind, out, predictions, min_score=0.3):
    """Write pictures, files and tables of predictions on grey images; return the summary."""
    writer = kind(out, [f"{i}" for i in range(len(predictions))], NAMES, min_score)
    records = []
    for i, prediction in enumerate(predictions):
        selected = writer.select(prediction)
        writer.draw(pil_to_tensor(grey_image()), selected).save(writer.path("pictures", i))
        records.append({"file_name": f"{i}.png", **writer.write(i, (40, 60), selected)})
    return writer.write_tables(records)


def test_coco_and_yolo_files_are_read_back_unchanged(tmp_path):
    nothing = {key: value[:0] for key, value in PREDICTION.items()}
    assert write_predictions(BoxWriter, tmp_path / "out", [PREDICTION, nothing]) == "2 objects: bird_{3} 1, cat 1"
    (tmp_path / "images").mkdir()
    for i in range(2):
        grey_image().save(tmp_path / f"images/{i}.png")
    files = {"train_images": "images", "train_annotations": "out/predictions.json",
             "val_images": "images", "val_annotations": "out/predictions.json"}  # fmt: skip
    module = CocoDataModule(str(tmp_path), **files, num_workers=0, annotation="masks")
    module.setup("validate")
    target = module.datasets["val"][0][1]
    assert module.class_names == NAMES
    assert target["labels"].tolist() == [2, 0]
    torch.testing.assert_close(target["boxes"], PREDICTION["boxes"][:2])
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
    torch.testing.assert_close(module.datasets["val"][0][1]["boxes"], PREDICTION["boxes"][:2], rtol=0, atol=1e-3)


def test_boxes_are_written_without_masks(tmp_path):
    prediction = {key: value for key, value in PREDICTION.items() if key != "masks"}
    write_predictions(BoxWriter, tmp_path / "out", [prediction], min_score=0.0)
    annotations = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    assert len(annotations) == 3
    assert "segmentation" not in annotations[0]
    assert annotations[0]["area"] == 300


def test_summary_of_no_objects(tmp_path):
    nothing = {key: value[:0] for key, value in PREDICTION.items()}
    assert write_predictions(BoxWriter, tmp_path / "out", [nothing]) == "0 objects"


def test_pictures_show_masks_boxes_and_a_legend(tmp_path):
    write_predictions(BoxWriter, tmp_path / "out", [PREDICTION])
    with Image.open(tmp_path / "out/pictures/0.png") as picture:
        pixels = np.asarray(picture).astype(int)
    factor = 480 // 60
    assert pixels.shape[1] == 480
    assert pixels.shape[0] > 40 * factor, "a legend below"
    blend = 0.6 * np.array(class_rgb(2)) + 0.4 * 128
    inside = pixels[12 * factor + 4, 20 * factor + 4]
    assert np.abs(inside - blend).max() <= 2, "the mask over the image"
    edge = pixels[12 * factor : 14 * factor, 30 * factor - 1 : 30 * factor + 2]
    assert (np.abs(edge - class_rgb(2)).sum(-1) == 0).any(), "the box"
    assert (pixels[2 * factor, 2 * factor] == 128).all(), "a score of 0.2 is not drawn"
    legend = pixels[40 * factor :]
    for label in (0, 2):
        assert (np.abs(legend - class_rgb(label)).sum(-1) == 0).sum() > 50


def test_label_maps_are_read_back_unchanged(tmp_path):
    label_map = torch.zeros(40, 60, dtype=torch.long)
    label_map[:10] = 2
    summary = write_predictions(MapWriter, tmp_path / "out", [label_map])
    assert summary == "2 classes: cat 75.0%, bird_{3} 25.0%"
    (tmp_path / "images").mkdir()
    grey_image().save(tmp_path / "images/0.png")
    folders = {"train_images": "images", "train_masks": "out/masks", "val_images": "images", "val_masks": "out/masks"}
    names = (tmp_path / "out/classes.txt").read_text().splitlines()
    module = MaskFolderDataModule(str(tmp_path), names=names, **folders, num_workers=0)
    module.setup("validate")
    assert names == NAMES
    assert torch.equal(module.datasets["val"][0][1].long(), label_map)
    with Image.open(tmp_path / "out/masks/0.png") as mask:
        assert mask.convert("RGB").getpixel((0, 0)) == class_rgb(2)
    with Image.open(tmp_path / "out/pictures/0.png") as picture:
        blend = [0.6 * value + 0.4 * 128 for value in class_rgb(0)]
        assert np.abs(np.array(picture.getpixel((240, 240))) - blend).max() <= 2


def test_classes_are_written_as_a_table(tmp_path):
    predictions = [torch.tensor([0.2, 0.7, 0.1]), torch.tensor([0.5, 0.1, 0.4])]
    assert write_predictions(ClassWriter, tmp_path / "out", predictions) == "$x$ 1, cat 1"
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file", "class", "probability", "class2", "probability2", "class3", "probability3"]
    assert [row["class"] for row in rows] == ["$x$", "cat"]
    assert [float(row["probability"]) for row in rows] == pytest.approx([0.7, 0.5])
    assert [row["class3"] for row in rows] == ["bird_{3}", "$x$"]
    assert {path.name for path in (tmp_path / "out/pictures").iterdir()} == {"0.png", "1.png"}


def test_folder_with_files_of_another_prediction_is_rejected(tmp_path):
    write_predictions(ClassWriter, tmp_path / "out", [torch.tensor([0.2, 0.7, 0.1])])
    ClassWriter(tmp_path / "out", ["0"], NAMES, 0.3).check_folder()
    with pytest.raises(ValueError, match=r"predictions\.csv: .* \(1 found\); choose another --predictions\.out"):
        MapWriter(tmp_path / "out", ["0"], NAMES, 0.3).check_folder()
    with pytest.raises(ValueError, match=r"pictures/0\.png: not a file of this prediction, .* must hold no others"):
        ClassWriter(tmp_path / "out", ["other"], NAMES, 0.3).check_folder()


def test_min_score_outside_0_to_1_is_rejected():
    with pytest.raises(ValueError, match=r"`predictions\.min_score` must be between 0 and 1, got 2"):
        PredictionWriter(min_score=2)
