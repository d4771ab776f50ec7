"""What users are told where other tests do not come by, found by reading the lines that no test ran."""

import builtins
import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from shunted_lit import ShuntedBackbone, ShuntedSelfAttention, cli
from shunted_lit.commands.benchmark import benchmark
from shunted_lit.commands.export import export
from shunted_lit.data import (
    CocoDataModule,
    ImageFolderDataModule,
    MaskFolderDataModule,
    ShapesDataModule,
    YoloDataModule,
)
from shunted_lit.data.image_io import DamagedError, read_image, read_size, read_text
from shunted_lit.data.sampling import SeededDataset
from shunted_lit.data.scenes import write_scenes
from shunted_lit.export.batched_detectors import batch_detector
from shunted_lit.models.detectors import build_detector
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.models.segmenters import Segmenter
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask
from shunted_lit.tasks.base import BaseTask
from shunted_lit.training.checkpoint import AtomicCheckpointIO
from shunted_lit.training.report import RunReport


class Nothing(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise DamagedError(f"image {index} is damaged")

    name_of = str


@pytest.mark.parametrize(("call", "told"), [
    (lambda: ClassificationTask(1), "`num_classes` must be at least 2, got 1"),
    (lambda: ClassificationTask(3, ["a", "b"]), r"`class_names` must have `num_classes` \(3\) names, got 2"),
    (lambda: ClassificationTask(2).on_load_checkpoint({"task": "Other"}), "is of Other, not of ClassificationTask"),
    (lambda: DetectionTask(2, pyramid_channels=48), "`pyramid_channels` must be a multiple of 32 for fcos, got 48"),
    (lambda: DetectionTask(2, anchor_scale=0), "`anchor_scale` must be above 0, got 0"),
    (lambda: build_detector("fcos", FeaturePath("resnet18"), 0), "`num_classes` must be at least 1, got 0"),
    (lambda: batch_detector(nn.Identity()), "Detectors that can be exported are FCOS, .*, got Identity"),
    (lambda: Segmenter("fpn", FeaturePath("resnet18", levels=[3, 4, 5]), 3), r"levels \[2, 3, 4, 5\], got \[3, 4, 5\]"),
    (lambda: ShuntedSelfAttention(64, 2, attn_drop=1.5), "dropout on attention is 1.5, but 0 to 1"),
    (lambda: ShuntedBackbone(dims=(64,)), r"have \[1, 4, 4, 4, 4\] entries; give each one a stage"),
    (lambda: ShuntedBackbone().forward_intermediates(torch.rand(1, 3, 32, 32), output_fmt="NLC"), "is 'NLC'"),
    (lambda: RunReport(-1), "report.images is -1, but 0 is the least"),
    (lambda: ShapesDataModule(seed=-1), "`seed` must be at least 0, got -1"),
    (lambda: SeededDataset(Nothing(), 5)[0], "All training images are damaged"),
    (lambda: benchmark(device="cuda", necks=["neck"], backbones=[]), "`device` must be cpu or auto, got cuda"),
])  # fmt: skip
def test_arguments_that_cannot_be(call, told):
    if "cuda" in told and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize(("options", "told"), [
    ({"train": 0}, "`train` must be at least 1, got 0"), ({"size": 8}, "`size` must be at least 16, got 8"),
])  # fmt: skip
def test_scenes_that_cannot_be(options, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        write_scenes(tmp_path / "out", **options)


@pytest.mark.parametrize("command", ["digits", "scenes"])
def test_what_is_not_installed_is_told(command, monkeypatch, tmp_path):
    genuine = builtins.__import__

    def without(name, *args, **keywords):
        if name.partition(".")[0] in ("sklearn", "skimage"):
            raise ImportError(f"No module named {name}")
        return genuine(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "skimage")]:
        monkeypatch.delitem(sys.modules, name)
    words = ["--kind=digits"] if command == "scenes" else []
    with pytest.raises(ValueError, match=r"Digits need scikit-learn .*pip install 'shunted-lit\[demo\]'"):
        cli.main([command, str(tmp_path / "out"), *words])


@pytest.mark.parametrize(("categories", "told"), [
    ([], "categories is empty; at least one is needed"),
    ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "categories has the name 'cat' twice"),
])  # fmt: skip
def test_categories_that_cannot_be(categories, told, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    files = {f"{split}_{kind}": name for split in ("train", "val")
             for kind, name in (("images", "images"), ("annotations", "all.json"))}  # fmt: skip
    with pytest.raises(ValueError, match=told):
        CocoDataModule(str(tmp_path), **files).class_names  # noqa: B018


def test_floating_point_images_are_told(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DamagedError, match=r"a\.tif: not a readable image \(mode F: 8 or 16 bits per pixel are "):
        read_image(tmp_path / "a.tif")


def test_samples_have_the_names_of_their_files(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    folders = ImageFolderDataModule(str(tmp_path), num_workers=0, batch_size=2)
    folders.setup("fit")
    assert sorted(folders.names_of(0, 0)) == [str(tmp_path / "train/a/1.png"), str(tmp_path / "train/b/2.png")]
    assert folders.dataset("val").read(0).size == (8, 8)
    assert len(list(folders.predict_dataloader())) == 1
    assert folders.state_dict() == {}, "there is no run"
    maps = MaskFolderDataModule(str(tmp_path), names=["x", "y"], num_workers=0, train_images="train/a",
                                train_masks="train/a", val_images="val/a", val_masks="val/a")  # fmt: skip
    assert maps.dataset("train").name_of(0) == str(tmp_path / "train/a/1.png")
    with pytest.raises(IndexError):
        ShapesDataModule(train_size=2).dataset("train")[2]


def test_a_checkpoint_goes_to_a_url_as_well():
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"a": torch.ones(2)}, "memory://run/last.ckpt")
    assert torch.equal(plugin.load_checkpoint("memory://run/last.ckpt")["a"], torch.ones(2))


def test_a_name_is_enough_for_attention_and_export(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    cli.main(["attention", str(tmp_path / "a.png"), "--ckpt=shunted_t", "--point=3,4", f"--out={out}"])
    assert out.is_file()
    export("shunted_t", "torch_export", tmp_path / "out.pt2", height=64, width=64)
    assert (tmp_path / "out.pt2").is_file()


def test_a_task_that_draws_nothing(tmp_path):
    class Plain(BaseTask):
        def __init__(self):
            super().__init__(2)

    with pytest.raises(NotImplementedError, match="Plain draws nothing"):
        Plain().draw(tmp_path / "a.png", [])


@pytest.mark.parametrize(("message", "essence"), [
    ("Caught DamagedError in DataLoader worker process 0.\nOriginal:\n  File x\nmodule.DamagedError: a.png: bad",
     "a.png: bad"),
    ("[/a/b/pair.cc:561] Connection closed by peer [1.2.3.4]:5. This is typically caused by a remote worker crashing.",
     "Connection closed by peer [1.2.3.4]:5."),
])  # fmt: skip
def test_messages_come_without_their_wrapping(message, essence):
    assert cli.essence(message) == essence


def test_an_error_of_no_known_kind_keeps_its_traceback(monkeypatch):
    def fails():
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(cli, "main", fails)
    with pytest.raises(RuntimeError, match="a fault of the program"):
        cli.command()


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, read_size):
        with pytest.raises(DamagedError, match=r"a\.png: not a readable image \(it is not a file\)"):
            read(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable text file \(it is not a file\)"):
        read_text(tmp_path / "a.png")


def test_images_of_other_formats_in_yolo_folders_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.gif"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("{train: images, val: images, names: [cat]}")
    YoloDataModule(str(tmp_path / "data.yaml"), num_workers=0).dataset("val")
    assert "images: skipping images in unsupported formats (1 .gif)" in caplog.text


def test_a_start_that_fails_leaves_no_folder(tmp_path):
    for split in ("train", "val"):
        for kind in "ab":
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "1.png").write_text("no image")
    words = [f"--data.root={tmp_path}", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match="not a readable image"):
        cli.main(["fit", "--model=ClassificationTask", "--data=ImageFolderDataModule", *words,
                  f"--trainer.default_root_dir={tmp_path / 'runs'}"])  # fmt: skip
    assert not list((tmp_path / "runs").glob("*"))


def test_check_tells_of_data_that_a_task_cannot_use(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="the task learns from boxes, but ImageFolderDataModule has class"):
        cli.main(["check", "--model=DetectionTask", "--data=ImageFolderDataModule", f"--data.root={tmp_path}"])


def test_a_checkpoint_that_is_cut_off_is_told(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"weight": torch.rand(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.ckpt: not a readable checkpoint \(it is cut off\)"):
        read_checkpoint(file)
