"""Error messages that the tests of the features do not reach."""

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
from shunted_lit.commands import errors
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


class DamagedDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        raise DamagedError(f"image {index} is damaged")

    name_of = str


@pytest.mark.parametrize(("call", "message"), [
    (lambda: ClassificationTask(1), "`num_classes` must be at least 2, got 1"),
    (lambda: ClassificationTask(3, ["a", "b"]), r"`class_names` must have `num_classes` \(3\) names, got 2"),
    (lambda: ClassificationTask(2).on_load_checkpoint({"task": "Other"}), "is of Other, not of ClassificationTask"),
    (lambda: DetectionTask(2, pyramid_channels=48), "`pyramid_channels` must be a multiple of 32 for fcos, got 48"),
    (lambda: DetectionTask(2, anchor_scale=0), "`anchor_scale` must be above 0, got 0"),
    (lambda: build_detector("fcos", FeaturePath("resnet18"), 0), "`num_classes` must be at least 1, got 0"),
    (lambda: batch_detector(nn.Identity()), "Detectors that can be exported are FCOS, .*, got Identity"),
    (lambda: Segmenter("fpn", FeaturePath("resnet18", levels=[3, 4, 5]), 3), r"levels \[2, 3, 4, 5\], got \[3, 4, 5\]"),
    (lambda: ShuntedSelfAttention(64, 2, attn_drop=1.5), "`attn_drop` must be between 0 and 1, got 1.5"),
    (lambda: ShuntedBackbone(dims=(64,)), r"one entry per stage, got \[1, 4, 4, 4, 4\] entries"),
    (lambda: ShuntedBackbone().forward_intermediates(torch.rand(1, 3, 32, 32), output_fmt="NLC"),
     "`output_fmt` must be one of NCHW, got 'NLC'"),
    (lambda: RunReport(-1), "`report.images` must be at least 0, got -1"),
    (lambda: ShapesDataModule(seed=-1), "`seed` must be at least 0, got -1"),
    (lambda: SeededDataset(DamagedDataset(), 5)[0], "All training images are damaged"),
    (lambda: benchmark(device="cuda", necks=["neck"], backbones=[]), "`device` must be cpu or auto, got cuda"),
])  # fmt: skip
def test_invalid_arguments_are_rejected(call, message):
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(("options", "message"), [
    ({"train": 0}, "`train` must be at least 1, got 0"), ({"size": 8}, "`size` must be at least 16, got 8"),
])  # fmt: skip
def test_invalid_scenes_are_rejected(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "out", **options)


@pytest.mark.parametrize("command", ["digits", "scenes"])
def test_missing_packages_are_reported(command, monkeypatch, tmp_path):
    original = builtins.__import__

    def without(name, *args, **keywords):
        if name.partition(".")[0] in ("sklearn", "skimage"):
            raise ImportError(f"No module named {name}")
        return original(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "skimage")]:
        monkeypatch.delitem(sys.modules, name)
    words = ["--kind=digits"] if command == "scenes" else []
    with pytest.raises(ValueError, match=r"Digits need scikit-learn .*pip install 'shunted-lit\[demo\]'"):
        cli.main([command, str(tmp_path / "out"), *words])


@pytest.mark.parametrize(("categories", "message"), [
    ([], r"categories.*(empty|at least)"),
    ([{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "categories has the name 'cat' twice"),
])  # fmt: skip
def test_invalid_categories_are_rejected(categories, message, tmp_path):
    (tmp_path / "all.json").write_text(json.dumps({"images": [], "annotations": [], "categories": categories}))
    files = {f"{split}_{kind}": name for split in ("train", "val")
             for kind, name in (("images", "images"), ("annotations", "all.json"))}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        CocoDataModule(str(tmp_path), **files).class_names  # noqa: B018


def test_floating_point_images_are_rejected(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DamagedError, match=r"a\.tif: not a readable image \(.* 8 or 16 bits per pixel, got mode F"):
        read_image(tmp_path / "a.tif")


def test_samples_are_named_by_their_files(tmp_path):
    for name in ("train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    folders = ImageFolderDataModule(str(tmp_path), num_workers=0, batch_size=2)
    folders.setup("fit")
    assert sorted(folders.names_of(0, 0)) == [str(tmp_path / "train/a/1.png"), str(tmp_path / "train/b/2.png")]
    assert folders.dataset("val").read(0).size == (8, 8)
    assert len(list(folders.predict_dataloader())) == 1
    assert folders.state_dict() == {}, "outside of a run"
    maps = MaskFolderDataModule(str(tmp_path), names=["x", "y"], num_workers=0, train_images="train/a",
                                train_masks="train/a", val_images="val/a", val_masks="val/a")  # fmt: skip
    assert maps.dataset("train").name_of(0) == str(tmp_path / "train/a/1.png")
    with pytest.raises(IndexError):
        ShapesDataModule(train_size=2).dataset("train")[2]


def test_checkpoint_can_be_written_to_a_url():
    plugin = AtomicCheckpointIO()
    plugin.save_checkpoint({"a": torch.ones(2)}, "memory://run/last.ckpt")
    assert torch.equal(plugin.load_checkpoint("memory://run/last.ckpt")["a"], torch.ones(2))


def test_attention_and_export_accept_the_name_of_a_variant(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    out = tmp_path / "out.png"
    cli.main(["attention", str(tmp_path / "a.png"), "--ckpt=shunted_t", "--point=3,4", f"--out={out}"])
    assert out.is_file()
    export("shunted_t", "safetensors", tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors/model.safetensors").is_file()


@pytest.mark.slow
def test_export_accepts_the_name_of_a_variant(tmp_path):
    export("shunted_t", "torch_export", tmp_path / "out.pt2", height=64, width=64)
    assert (tmp_path / "out.pt2").is_file()


def test_task_without_pictures_says_so(tmp_path):
    class Plain(BaseTask):
        def __init__(self):
            super().__init__(2)

    with pytest.raises(NotImplementedError, match="Plain draws nothing"):
        Plain().draw(tmp_path / "a.png", [])


@pytest.mark.parametrize(("message", "short"), [
    ("Caught DamagedError in DataLoader worker process 0.\nOriginal:\n  File x\nmodule.DamagedError: a.png: bad",
     "a.png: bad"),
    ("[/a/b/pair.cc:561] Connection closed by peer [1.2.3.4]:5. This is typically caused by a remote worker crashing.",
     "Connection closed by peer [1.2.3.4]:5."),
])  # fmt: skip
def test_messages_are_shortened(message, short):
    assert errors.shorten_message(message) == short


PARSER_MESSAGES = [
    ('Parser key "n":\n  Not of type PositiveInt: 0 does not conform to restriction v>0',
     "`n` must be an integer above 0, got 0"),
    ('Parser key "n":\n  Not of type PositiveInt: invalid literal for int() with base 10: \'x\'',
     "`n` must be an integer above 0, got 'x'"),
    ('Parser key "f":\n  Does not validate against any of the Union subtypes\n  Subtypes: [...]\n  Errors:\n'
     "    - Not of type ClosedUnitInterval: does not conform to restriction v>=0 and v<=1\n"
     "    - Expected a <class 'NoneType'>\n  Given value type: <class 'str'>\n  Given value: 2",
     "`f` must be a number between 0 and 1 or null, got 2"),
    ('Parser key "data":\n  Problem with given class_path \'a.B\':\n    Parser key "m":\n'
     "      Expected a typing.Literal['a', 'b']. Got value: c", "`data.m` must be one of 'a', 'b', got c"),
    ('Parser key "t":\n  Expected a tuple with 2 elements. Got value: [1]',
     "`t` must be a tuple with 2 elements, got [1]"),
    ("Does not validate against any of the Union subtypes\nSubtypes: [...]\nErrors:\n  - two lines\nof a class\n"
     "  - Expected a <class 'NoneType'>\nGiven value: x", "two lines\nof a class"),
]  # fmt: skip


@pytest.mark.parametrize(("message", "line"), PARSER_MESSAGES, ids=[line for _, line in PARSER_MESSAGES])
def test_parser_messages_become_one_line(message, line):
    assert errors.shorten_message(message) == line


@pytest.mark.parametrize(("variables", "prefix"), [
    ({}, "shunted-lit"), ({"RANK": "0", "LOCAL_RANK": "1"}, "shunted-lit"),
    ({"SLURM_PROCID": "3"}, "shunted-lit: rank 3"),
])  # fmt: skip
def test_messages_name_the_rank(variables, prefix, monkeypatch):
    for name in errors.RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert errors.program_name() == prefix


@pytest.mark.parametrize("phrase", errors.RUNTIME_ADVICE)
def test_failures_of_the_machine_come_with_advice(phrase):
    message = errors.describe_error(RuntimeError(f"failed: {phrase}"))
    assert message.startswith(f"failed: {phrase}")
    assert "--" in message


def test_bugs_keep_their_traceback(monkeypatch):
    def fails():
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "main", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.command()


def test_pipes_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for read in (read_image, read_size):
        with pytest.raises(DamagedError, match=r"a\.png: not a readable image \(it is not a file\)"):
            read(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: not a readable text file \(it is not a file\)"):
        read_text(tmp_path / "a.png")


def test_other_image_formats_in_yolo_folders_are_counted(tmp_path, caplog):
    for name in ("a.png", "b.gif"):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("{train: images, val: images, names: [cat]}")
    YoloDataModule(str(tmp_path / "data.yaml"), num_workers=0).dataset("val")
    assert "images: skipping images in unsupported formats (1 .gif)" in caplog.text


def test_failed_start_leaves_no_run_folder(tmp_path):
    for split in ("train", "val"):
        for kind in "ab":
            (tmp_path / split / kind).mkdir(parents=True)
            (tmp_path / split / kind / "1.png").write_text("no image")
    words = [f"--data.root={tmp_path}", "--data.num_workers=0", "--trainer.accelerator=cpu"]
    with pytest.raises(ValueError, match="not a readable image"):
        cli.main(["fit", "--model=ClassificationTask", "--data=ImageFolderDataModule", *words,
                  f"--trainer.default_root_dir={tmp_path / 'runs'}"])  # fmt: skip
    assert not list((tmp_path / "runs").glob("*"))


def test_check_rejects_data_without_the_labels_of_the_task(tmp_path):
    (tmp_path / "train/a").mkdir(parents=True)
    with pytest.raises(ValueError, match="the task learns from boxes, but ImageFolderDataModule has class"):
        cli.main(["check", "--model=DetectionTask", "--data=ImageFolderDataModule", f"--data.root={tmp_path}"])


def test_truncated_checkpoint_is_rejected(tmp_path):
    file = tmp_path / "a.ckpt"
    torch.save({"weight": torch.rand(1000)}, file)
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"a\.ckpt: not a readable checkpoint \(it is truncated\)"):
        read_checkpoint(file)
