"""Untrusted files: those that would run code, fill the memory, or lead out of a folder."""

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from helpers.readers import coco_files
from PIL import Image

from shunted_lit import ShuntedBackbone, ShuntedTransformer  # noqa: F401 - registers the models
from shunted_lit.cli import main
from shunted_lit.data import CocoDataModule, ImageFolderDataModule, YoloDataModule
from shunted_lit.data.image_io import DamagedError, read_image, read_size
from shunted_lit.data.scenes import write_scenes
from shunted_lit.data.segmentation import read_mask
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask


@pytest.fixture
def folder(tmp_path):
    """The current folder; data/conftest.py has another fixture of this name."""
    return tmp_path


@pytest.fixture(scope="module")
def yolo_yaml(tmp_path_factory):
    """Model YAML of a YOLO with the neck."""
    file = tmp_path_factory.mktemp("yolo") / "m.yaml"
    main(["yolo", "yaml", "--base=yolo11n", f"--out={file}"])
    return file


@pytest.fixture
def set_folder(tmp_path):
    """Small scenes in the folder `set`, to damage."""
    write_scenes(tmp_path / "set", train=3, val=2, size=32)
    return tmp_path / "set"


# --- checkpoints that would run code


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def write_zip(path):
    torch.save({"state_dict": {"weight": Payload()}, "task": "DetectionTask", "hyper_parameters": {}}, path)


def write_legacy_file(path):
    torch.save({"state_dict": {"weight": Payload()}}, path, _use_new_zipfile_serialization=False)


def write_pickle(path):
    Path(path).write_bytes(pickle.dumps({"state_dict": Payload()}))


def write_module(path):
    torch.save({"model": torch.nn.Linear(1, 1)}, path)  # its class may be any code


READERS = {
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


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("write", [write_zip, write_legacy_file, write_pickle, write_module])
def test_a_checkpoint_that_would_run_code_is_refused(reader, write, request):
    path = "evil.ckpt"
    write(path)
    Image.new("RGB", (8, 8)).save("image.png")
    if reader == "yolo":
        shutil.copy(request.getfixturevalue("yolo_yaml"), "m.yaml")
    error = (pickle.UnpicklingError, RuntimeError) if reader == "timm" else ValueError  # timm's own
    with pytest.raises(error, match=r"evil\.ckpt|[wW]eights.only"):
        READERS[reader](path)
    assert not Path("ran").exists()


def test_the_payload_runs_without_weights_only():
    write_zip("evil.ckpt")
    torch.load("evil.ckpt", weights_only=False)
    assert Path("ran").exists()


def test_the_message_names_a_module_in_a_checkpoint():
    write_module("model.pt")
    with pytest.raises(ValueError, match=r"model.pt: holds torch.nn.modules.linear.Linear, which is more than weights"):
        read_checkpoint("model.pt")


def test_a_pickle_named_safetensors_is_refused():
    write_pickle("evil.safetensors")
    with pytest.raises(ValueError, match=r"evil.safetensors: not a readable checkpoint"):
        read_checkpoint("evil.safetensors")
    assert not Path("ran").exists()


# --- files that would fill the memory


def test_a_compressed_checkpoint_is_refused():
    torch.save({"weight": torch.zeros(2**20)}, "plain.ckpt")
    with zipfile.ZipFile("plain.ckpt") as plain, zipfile.ZipFile("packed.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert Path("packed.ckpt").stat().st_size * 100 < Path("plain.ckpt").stat().st_size
    assert read_checkpoint("plain.ckpt")["weight"].numel() == 2**20
    with pytest.raises(ValueError, match=r"packed.ckpt: not a checkpoint; it is not loaded, .* can grow to any size"):
        read_checkpoint("packed.ckpt")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def write_bomb(path, width=60000, height=60000):
    """Write a PNG of a few hundred bytes that would decode to gigabytes."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def test_an_image_that_decodes_to_gigabytes_is_refused(folder, set_folder):
    bomb = folder / "set/images/train/000001.png"
    write_bomb(bomb)
    message = r"000001.png: not a readable image \(Image size \(3600000000 pixels\) exceeds limit"
    data = YoloDataModule("set/data.yaml", num_workers=0)
    with pytest.raises(ValueError, match=message):
        data.prepare_data()
    with pytest.raises(ValueError, match=message):
        data.datasets["train"].read(1)
    with pytest.raises(ValueError, match=message):
        main(["attention", str(bomb), "--ckpt=none.ckpt", "--point=1,1"])


def test_postscript_in_an_image_is_not_run(tmp_path):
    """PIL would pass it to Ghostscript."""
    path = tmp_path / "image.png"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(ran) (w) file closefile\n%%EOF\n"
    )
    assert Image.open(path).format == "EPS"
    for read in (read_image, read_size, read_mask):
        with pytest.raises(DamagedError, match=r"image.png: not a readable "):
            read(path)


def test_a_png_with_a_huge_text_is_refused(folder, set_folder):
    path = folder / "set/images/train/000001.png"
    content = path.read_bytes()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 2**26))
    path.write_bytes(content[:33] + text + content[33:])
    with pytest.raises(ValueError, match=r"000001.png: not a readable image"):
        YoloDataModule("set/data.yaml", num_workers=0).prepare_data()


def test_names_that_expand_to_gigabytes_are_refused(folder, set_folder):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    for names, message in (("*a11", "the name of class 0 must be text, got a list"),
                           ("{0: *a11}", "the name of class 0 must be text, got a list"),
                           ("{a: *a11}", "the keys of names must be")):  # fmt: skip
        (folder / "set/bomb.yaml").write_text("\n".join([*lines, "train: images/train", "val: images/val",
                                                         f"names: {names}"]))  # fmt: skip
        with pytest.raises(ValueError, match=message):
            YoloDataModule("set/bomb.yaml")


@pytest.mark.parametrize("key", ["nc", "path", "train", "val"])
def test_other_entries_that_expand_to_gigabytes_are_refused(folder, set_folder, key):
    content = {"train": "images/train", "val": "images/val", "names": "[a, b, c, d, e]", "path": "."}
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    lines += [f"{name}: {value}" for name, value in {**content, key: "*a11"}.items()]
    (folder / "set/bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=rf"bomb.yaml: {key} must be .*, got a list"):
        YoloDataModule("set/bomb.yaml").setup("fit")


def test_masks_that_expand_to_gigabytes_are_refused(folder, set_folder):
    file = folder / "set/annotations/train.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image.update(width=200_000, height=200_000)
    content["annotations"][0]["segmentation"] = {"size": [200_000, 200_000], "counts": "5505"}
    file.write_text(json.dumps(content))
    data = CocoDataModule("set", **coco_files(), annotation="masks")
    with pytest.raises(ValueError, match="integers of at most 178956970 pixels together"):
        data.setup("fit")


# --- paths out of a folder


def read_coco_with_file_name(folder, name):
    file = folder / "annotations/train.json"
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = name
    file.write_text(json.dumps(content))
    data = CocoDataModule("set", **coco_files())
    data.setup("fit")
    return data


@pytest.mark.parametrize("name", ["../val/000001.png", "/etc/passwd", "a/../../val/000001.png", "a/../000001.png"])
def test_annotations_do_not_lead_out_of_the_images(set_folder, name):
    with pytest.raises(ValueError, match=rf"image 2 has the file_name {name}, which is not within .*images/train"):
        read_coco_with_file_name(set_folder, name)


def test_data_yaml_may_name_any_path(folder, set_folder):
    """The user chooses it, as a config: absolute paths and parent folders are allowed."""
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


def test_links_to_files_are_read_and_links_to_folders_are_not_entered(folder, set_folder):
    images = folder / "set/images/train"
    os.replace(images / "000001.png", folder / "elsewhere.png")
    (images / "000001.png").symlink_to(folder / "elsewhere.png")
    (images / "again").symlink_to(images, target_is_directory=True)
    data = YoloDataModule("set/data.yaml", num_workers=0)
    data.prepare_data()
    assert len(data.datasets["train"]) == 3


def test_a_broken_link_raises(folder, set_folder):
    path = folder / "set/images/train/000001.png"
    path.unlink()
    path.symlink_to(folder / "nowhere.png")
    with pytest.raises(ValueError, match=r"000001.png: no such image"):
        YoloDataModule("set/data.yaml", num_workers=0).prepare_data()


def test_class_folders_may_be_links_but_not_loops(folder):
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


# --- safetensors


def test_each_reader_of_weights_reads_safetensors():
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
