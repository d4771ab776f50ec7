"""Data in YOLO's format."""

import logging
from pathlib import Path

import pytest
import torch
import yaml
from helpers.readers import STILL, read_yolo, same_sample

from shunted_lit.data import YoloDataModule
from shunted_lit.data.yolo import label_path


@pytest.mark.parametrize("form", ["list of folders", "txt", "path", "names as list"])
def test_each_form_of_data_yaml_is_read(folder, form):
    expected = read_yolo(folder)
    file = folder / "data.yaml"
    content = yaml.safe_load(file.read_text())
    if form == "list of folders":
        content["train"] = ["images/train"]
    elif form == "txt":
        lines = sorted((folder / "images/train").iterdir())
        (folder / "train.txt").write_text("".join(f"./images/train/{path.name}\n" for path in lines))
        content["train"] = "train.txt"
    elif form == "path":
        content["path"] = str(folder)
        file = folder.parent / "elsewhere.yaml"
    else:
        content["names"] = list(content["names"].values())
        content["nc"] = len(content["names"])
    file.write_text(yaml.safe_dump(content))
    module = YoloDataModule(str(file), **STILL)
    module.setup("fit")
    assert module.class_names == expected.class_names
    assert all(same_sample(module.datasets["train"][i], expected.datasets["train"][i]) for i in range(6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": None}, "names missing"),
        ({"names": {0: "a", 2: "b"}}, r"the keys of names must be 0 to 1, got \[0, 2\]"),
        ({"names": "cat"}, "names must be a list, or a mapping from 0, 1, ..., got a str"),
        ({"nc": 80}, "nc must be 5, the number of names, got 80"),
        ({"val": "images/none"}, "val names .*none, which is neither a folder nor a .txt"),
        ({"val": "annotations"}, "val has no images; their names must end in .bmp"),
        ({"train": "list.txt"}, "list.txt:2: there is no image .*gone.png"),
    ],
)
def test_invalid_data_yaml_raises(folder, change, message):
    (folder / "list.txt").write_text("images/train/000000.png\nimages/train/gone.png\n")
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), **change}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        read_yolo(folder)


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_unreadable_data_yaml_raises(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"data\.yaml"):
        YoloDataModule(str(tmp_path / "data.yaml"))
    with pytest.raises(ValueError, match="no such file"):
        YoloDataModule(str(tmp_path / "none.yaml"))


def test_splits_may_share_a_folder(folder):
    for split, numbers in (("train", range(4)), ("val", range(4, 6))):
        (folder / f"{split}.txt").write_text("".join(f"images/train/{number:06d}.png\n" for number in numbers))
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "train": "train.txt", "val": "val.txt"}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    module = read_yolo(folder)
    assert (len(module.datasets["train"]), len(module.datasets["val"])) == (4, 2)


def test_path_may_be_relative_to_the_working_directory(folder, monkeypatch):
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "path": "set"}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/data.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(folder.parent)
    assert len(read_yolo(folder / "elsewhere").datasets["train"]) == 6


def test_label_path_replaces_the_last_images_folder():
    assert label_path(Path("/a/images/b/images/c/x.jpg")) == Path("/a/images/b/labels/c/x.txt")
    assert label_path(Path("/a/pictures/x.y.png")) == Path("/a/pictures/x.y.txt")


def test_polygons_become_boxes(folder):
    (folder / "labels/train/000000.txt").write_text("1 0.25 0.5 0.75 0.25 0.5 0.75\n")
    target = read_yolo(folder).datasets["train"][0][1]
    assert target["boxes"].tolist() == [[24, 24, 72, 72]]
    assert target["labels"].tolist() == [1]


def test_yolo_polygons_become_masks(folder):
    for path in (folder / "labels/train").iterdir():
        path.write_text("1 0.25 0.5 0.75 0.5 0.75 0.75 0.25 0.75\n")
    for path in (folder / "labels/val").iterdir():
        path.unlink()
    (folder / "labels/val/000000.txt").write_text("0 0.1 0.1 0.2 0.1 0.2 0.2\n")
    target = read_yolo(folder, annotation="masks").datasets["train"][0][1]
    expected = torch.zeros(1, 96, 96, dtype=torch.bool)
    expected[:, 48:72, 24:72] = True
    assert torch.equal(target["masks"], expected)
    assert target["boxes"].tolist() == [[24, 48, 72, 72]]
    (folder / "labels/train/000000.txt").write_text("1 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match=r"000000.txt:1: masks need a polygon on each line .*, got a box"):
        read_yolo(folder, annotation="masks")


def test_images_without_labels_are_background_and_counted(folder, caplog):
    (folder / "labels/train/000000.txt").unlink()
    (folder / "labels/train/000001.txt").write_text("\n")
    with caplog.at_level(logging.WARNING):
        module = read_yolo(folder)
    assert len(module.datasets["train"][0][1]["boxes"]) == len(module.datasets["train"][1][1]["boxes"]) == 0
    assert "train: 2 of 6 images have no object" in caplog.text


def test_an_image_named_twice_raises(folder):
    content = {**yaml.safe_load((folder / "data.yaml").read_text()), "train": ["images/train", "images/train"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"000000\.txt belongs to several images, or to one that is named twice"):
        read_yolo(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 0.2", r"000002.txt:2: expected 5 numbers \(class cx cy w h\), .* got 4\."),
        ("9 0.5 0.5 0.2 0.2", "txt:2: class must be 0 to 4, an index of names, got 9"),
        ("-1 0.5 0.5 0.2 0.2", "txt:2: class must be 0 to 4, an index of names, got -1"),
        ("1.5 0.5 0.5 0.2 0.2", "txt:2: class must be 0 to 4, an index of names, got 1.5"),
        ("0 0.9 0.5 0.4 0.2", r"txt:2: the box 0.7 0.4 1.1 0.6 .* not within the image"),
        ("0 0.5 0.5 0 0.2", "txt:2: the box .* has no area; correct it, or set `bad_boxes` to drop"),
        ("0 0.5 0.5 -0.1 0.2", "txt:2: the box .* has no area; correct it, or set `bad_boxes` to drop"),
        ("0 0.5 0.5 nan 0.2", "txt:2: numbers must be finite, got '0 0.5 0.5 nan 0.2'"),
        ("0 0.5 x 0.1 0.2", r"txt:2: expected numbers \(class cx cy w h\), got '0 0.5 x 0.1 0.2'"),
        ("0 0.1 0.2 0.3 0.4 0.5 0.6 0.7", "txt:2: expected 5 numbers .*, got 8"),
    ],
)
def test_invalid_labels_raise_with_file_and_line(folder, line, message):
    (folder / "labels/train/000002.txt").write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_yolo(folder)


def test_all_faults_of_yolo_labels_are_in_one_message(folder):
    (folder / "labels/train/000001.txt").write_text("0 0.5 0.5 0.2\n9 0.5 0.5 0.2 0.2\n")
    (folder / "labels/train/000002.txt").write_text("0 0.5 0.5 0.5 0.5\n0 0.9 0.5 0.4 0.2\n")
    with pytest.raises(ValueError, match="3 faults") as error:
        read_yolo(folder)
    lines = str(error.value).splitlines()
    for line, part in zip(lines, ("000001.txt:1: ", "000001.txt:2: ", "000002.txt:2: "), strict=False):
        assert part in line
    assert lines[3].endswith("data.yaml: 3 faults.")
    (folder / "labels/train/000003.txt").write_text("x\n" * 400)
    with pytest.raises(ValueError, match="403 faults, the first 10 above") as error:
        read_yolo(folder)
    assert len(str(error.value).splitlines()) == 11


def test_bad_boxes_can_be_dropped_and_are_counted(folder, caplog):
    (folder / "labels/train/000002.txt").write_text("0 0.5 0.5 0.5 0.5\n0 0.9 0.5 0.4 0.2\n0 0.5 0.5 0 0.2\n")
    module = read_yolo(folder, bad_boxes="drop")
    assert len(module.datasets["train"][2][1]["boxes"]) == 1
    assert "dropped 2 objects" in caplog.text
