"""Files that are not ours: what would run code, fill the memory, or lead out of a folder."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from shunted_lit import ShuntedBackbone, ShuntedTransformer  # noqa: F401 - registers the models
from shunted_lit.cli import main
from shunted_lit.data import CocoDataModule, ImageFolderDataModule, YoloDataModule
from shunted_lit.data.image_io import DamagedError, read_image, read_size
from shunted_lit.data.scenes import write_scenes
from shunted_lit.data.segmentation import read_mask
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- checkpoints that would run code


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def as_zip(path):
    torch.save({"state_dict": {"weight": Payload()}, "task": "DetectionTask", "hyper_parameters": {}}, path)


def as_old_torch_file(path):
    torch.save({"state_dict": {"weight": Payload()}}, path, _use_new_zipfile_serialization=False)


def as_pickle(path):
    Path(path).write_bytes(pickle.dumps({"state_dict": Payload()}))


def with_a_module(path):
    torch.save({"model": torch.nn.Linear(1, 1)}, path)  # whose class may be any code


DOORS = {
    "read_checkpoint": read_checkpoint,
    "neck": ShuntedTransformer.from_checkpoint,
    "timm": lambda path: timm.create_model("shunted_t", checkpoint_path=path),
    "detector": lambda path: DetectionTask(2, weights=path),
    "segmenter": lambda path: SegmentationTask(2, weights=path),
    "classifier": lambda path: ClassificationTask(2, weights=path),
    "fit": lambda path: main(["fit", "--model=DetectionTask", "--data=ShapesDataModule", f"--ckpt_path={path}"]),
    "validate": lambda path: main(["validate", f"--ckpt_path={path}"]),
    "predict": lambda path: main(["predict", f"--ckpt_path={path}", "--data.images=."]),
    "export": lambda path: main(["export", path]),
    "attention": lambda path: main(["attention", "image.png", f"--ckpt={path}", "--point=1,1"]),
    "yolo": lambda path: main(["yolo", "weights", "--model=m.yaml", f"--neck={path}", "--out=o.pt"]),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("write", [as_zip, as_old_torch_file, as_pickle, with_a_module])
def test_a_checkpoint_that_would_run_code_is_refused(door, write):
    path = "evil.ckpt"
    write(path)
    Image.new("RGB", (8, 8)).save("image.png")
    if door == "yolo":
        main(["yolo", "yaml", "--base=yolo11n", "--out=m.yaml"])
    error = (pickle.UnpicklingError, RuntimeError) if door == "timm" else ValueError  # timm's own
    with pytest.raises(error, match=r"evil\.ckpt|[wW]eights.only"):
        DOORS[door](path)
    assert not Path("ran").exists()


def test_the_payload_does_run_where_code_is_let_in():
    as_zip("evil.ckpt")
    torch.load("evil.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_a_module_is_named_in_the_message():
    with_a_module("model.pt")
    with pytest.raises(ValueError, match=r"model.pt: holds torch.nn.modules.linear.Linear, which is more than weights"):
        read_checkpoint("model.pt")


def test_a_pickle_called_safetensors_is_no_safetensors():
    as_pickle("evil.safetensors")
    with pytest.raises(ValueError, match=r"evil.safetensors: not a readable checkpoint"):
        read_checkpoint("evil.safetensors")
    assert not Path("ran").exists()


# --- files that would fill the memory


def test_a_checkpoint_that_unpacks_to_more_is_refused():
    torch.save({"weight": torch.zeros(2**20)}, "plain.ckpt")
    with zipfile.ZipFile("plain.ckpt") as plain, zipfile.ZipFile("packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert Path("packed.ckpt").stat().st_size * 100 < Path("plain.ckpt").stat().st_size
    assert read_checkpoint("plain.ckpt")["weight"].numel() == 2**20
    with pytest.raises(ValueError, match=r"packed.ckpt: is no checkpoint, and is not loaded, .* unpack to any size"):
        read_checkpoint("packed.ckpt")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path, width=60000, height=60000):
    """A PNG of a few hundred bytes that is some gigabytes once it is read."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def test_an_image_that_unpacks_to_gigabytes_is_refused_unread(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    bomb = folder / "set/images/train/000001.png"
    write_bomb(bomb)
    told = r"000001.png: not a readable image \(Image size \(3600000000 pixels\) exceeds limit"
    data = YoloDataModule("set/data.yaml", num_workers=0)
    with pytest.raises(ValueError, match=told):
        data.prepare_data()
    with pytest.raises(ValueError, match=told):
        data.datasets["train"].read(1)
    with pytest.raises(ValueError, match=told):
        main(["attention", str(bomb), "--ckpt=none.ckpt", "--point=1,1"])


def test_postscript_in_an_image_is_not_run(tmp_path):
    """PIL would hand it to Ghostscript."""
    path = tmp_path / "image.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile\n%%EOF\n"
    )
    assert Image.open(path).format == "EPS"
    for read in (read_image, read_size, read_mask):
        with pytest.raises(DamagedError, match=r"image.png: not a readable "):
            read(path)


def test_a_text_that_unpacks_to_gigabytes_is_no_image(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    path = folder / "set/images/train/000001.png"
    content = path.read_bytes()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**26))
    path.write_bytes(content[:33] + text + content[33:])
    with pytest.raises(ValueError, match=r"000001.png: not a readable image"):
        YoloDataModule("set/data.yaml", num_workers=0).prepare_data()


def test_names_that_unpack_to_gigabytes_are_refused_in_no_time(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for names, told in (("*a11", "the name of class 0 is a list"), ("{0: *a11}", "the name of class 0 is a list"),
                        ("{a: *a11}", "names has the keys")):  # fmt: skip
        (folder / "set/bomb.yaml").write_text("\n".join([*lines, "train: images/train", "val: images/val",
                                                         f"names: {names}"]))  # fmt: skip
        with pytest.raises(ValueError, match=told):
            YoloDataModule("set/bomb.yaml")


@pytest.mark.parametrize("key", ["nc", "path", "train", "val"])
def test_other_entries_that_unpack_to_gigabytes(folder, key):
    write_scenes(folder / "set", train=3, val=2, size=32)
    content = {"train": "images/train", "val": "images/val", "names": "[a, b, c, d, e]", "path": "."}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    lines += [f"{name}: {value}" for name, value in {**content, key: "*a11"}.items()]
    (folder / "set/bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"bomb.yaml: {key} is"):
        YoloDataModule("set/bomb.yaml").setup("fit")


def test_masks_that_unpack_to_gigabytes_are_refused_before_they_are_drawn(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    file = folder / "set/annotations/train.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image.update(width=200_000, height=200_000)
    content["annotations"][0]["segmentation"] = {"size": [200_000, 200_000], "counts": "5505"}
    file.write_text(json.dumps(content))
    data = CocoDataModule("set", "images/train", "annotations/train.json", "images/val", "annotations/val.json",
                          annotation="masks")  # fmt: skip
    with pytest.raises(ValueError, match="whole numbers of 178956970 pixels or less together"):
        data.setup("fit")


# --- ways out of a folder


def coco(folder, name):
    write_scenes(folder / "set", train=3, val=2, size=32)
    file = folder / "set/annotations/train.json"
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = name
    file.write_text(json.dumps(content))
    data = CocoDataModule("set", "images/train", "annotations/train.json", "images/val", "annotations/val.json")
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["../val/000001.png", "/etc/passwd", "a/../../val/000001.png", "a/../000001.png"])
def test_annotations_do_not_lead_out_of_the_images(folder, name):
    with pytest.raises(ValueError, match=rf"image 2 has the file_name {name}, which is not within .*images/train"):
        coco(folder, name)


def test_data_yaml_names_places_anywhere(folder):
    """It is the user's word, as a config is: absolute paths, and folders beside its own."""
    write_scenes(folder / "set", train=3, val=2, size=32)
    (folder / "lists").mkdir()
    names = (folder / "set/classes.txt").read_text().split()
    for train in (str(folder / "set/images/train"), "../set/images/train", "train.txt"):
        (folder / "lists/data.yaml").write_text(
            json.dumps({"train": train, "val": "../set/images/val", "names": names})
        )
        (folder / "lists/train.txt").write_text(
            f"{folder}/set/images/train/000000.png\n../set/images/train/000001.png\n"
        )
        data = YoloDataModule("lists/data.yaml", num_workers=0)
        data.setup("fit")
        assert len(data.datasets["train"]) == (2 if train == "train.txt" else 3)
        assert data.datasets["train"][0][1]["boxes"].numel()


def test_links_to_files_are_read_and_links_to_folders_are_not_entered(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    images = folder / "set/images/train"
    os.replace(images / "000001.png", folder / "elsewhere.png")
    (images / "000001.png").symlink_to(folder / "elsewhere.png")
    (images / "again").symlink_to(images, target_is_directory=True)
    data = YoloDataModule("set/data.yaml", num_workers=0)
    data.prepare_data()
    assert len(data.datasets["train"]) == 3


def test_a_link_that_leads_nowhere_is_told(folder):
    write_scenes(folder / "set", train=3, val=2, size=32)
    path = folder / "set/images/train/000001.png"
    path.unlink()
    path.symlink_to(folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"000001.png: no such image"):
        YoloDataModule("set/data.yaml", num_workers=0).prepare_data()


def test_classes_may_be_links_but_not_to_themselves(folder):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (folder / "real" / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(folder / "real" / split / name / "a.png")
        (folder / "set" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (folder / "set" / split / name).symlink_to(folder / "real" / split / name, target_is_directory=True)
    data = ImageFolderDataModule("set", num_workers=0)
    data.prepare_data()
    assert len(data.datasets["train"]) == 2
    (folder / "real/train/cat/loop").symlink_to(folder / "real/train/cat", target_is_directory=True)
    with pytest.raises(ValueError, match=r"train/cat/loop: is a link to .*train/cat, whose images would be read twice"):
        ImageFolderDataModule("set", num_workers=0).prepare_data()


# --- safetensors, wherever weights are read


def test_safetensors_wherever_weights_are_read(folder):
    neck = ShuntedTransformer(cin=32, depth=1, num_heads=4)
    safetensors.torch.save_file(neck.state_dict(), "neck.safetensors")
    assert set(read_checkpoint("neck.safetensors")) == set(neck.state_dict())
    classifier = timm.create_model("shunted_t", num_classes=3)
    safetensors.torch.save_file(classifier.state_dict(), "t.safetensors")
    for task in (
        DetectionTask(2, backbone="shunted_t", weights="t.safetensors"),
        SegmentationTask(2, weights="t.safetensors"),
        ClassificationTask(5, weights="t.safetensors"),
        ClassificationTask(3, weights="t.safetensors"),
    ):
        mine = next(v for k, v in task.state_dict().items() if k.endswith("patch_embed.conv.0.weight"))
        assert mine.equal(classifier.state_dict()["stages.0.patch_embed.conv.0.weight"])
