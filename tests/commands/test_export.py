"""`shunted-lit export` rejects what it cannot export, before the long part, and overwrites nothing."""

from pathlib import Path

import pytest
import torch
from helpers.exports import SMALL, save_checkpoint

from shunted_lit.cli import main
from shunted_lit.export import formats
from shunted_lit.tasks import DetectionTask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.ckpt", "--format=onnx"], r"`source` must be a file or one of neck, shunted_t.*; there is no file a\.ckpt"),
        (["neck", "--format=onnx", "--height=0"], "`height` must be at least 1, got 0"),
        (["neck", "--format=onnx", "--out=neck.xml"], r"neck\.xml.* must end in \.onnx"),
        (["neck", "--height=3"], "`height` and `width` cannot be fixed in safetensors, .*; omit them"),
        (["neck", "--format=onnx", "--options={cin: 9}"], "got 2 heads and 9 channels"),
    ],
)
def test_wrong_arguments_are_reported(arguments, message):
    with pytest.raises(ValueError, match=message):
        main(["export", *arguments])
    assert not list(Path().iterdir())


def test_unknown_format_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "neck", "--format=tensorrt"])
    assert stop.value.code == 2
    assert "'onnx', 'openvino', 'torch_export', 'safetensors'" in capsys.readouterr().err


def test_missing_runtime_names_its_extra(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(ValueError, match=r"openvino needs openvino: pip install 'shunted-lit\[export\]'"):
        main(["export", "neck", "--format=openvino"])


def test_existing_files_and_folders_are_not_overwritten():
    for name in ("neck.onnx", "model.bin"):
        Path(name).write_text("mine")
    with pytest.raises(ValueError, match=r"neck\.onnx`? (is there already|already exists).*another"):
        main(["export", "neck", "--format=onnx"])
    with pytest.raises(ValueError, match=r"model\.bin`? (is there already|already exists).*another"):
        main(["export", "neck", "--format=openvino", "--out=model.xml"])
    assert Path("neck.onnx").read_text() == Path("model.bin").read_text() == "mine"
    Path("folder").mkdir()
    Path("folder/mine").touch()
    with pytest.raises(ValueError, match=r"folder`? .*not empty"):
        main(["export", "shunted_t", "--out=folder"])


def test_checkpoints_that_cannot_be_exported_are_reported():
    checkpoint = save_checkpoint(DetectionTask(2, **SMALL), "best.ckpt")
    with pytest.raises(ValueError, match=r"safetensors takes classifiers, .*; choose onnx, .*or --part=neck"):
        main(["export", checkpoint])
    with pytest.raises(ValueError, match=r"`options` are for models by name, but best\.ckpt is a file; leave them out"):
        main(["export", checkpoint, "--format=onnx", "--options={cin: 8}"])
    content = torch.load("best.ckpt", weights_only=True)
    torch.save({**content, "task": "PoseTask"}, "pose.ckpt")
    with pytest.raises(ValueError, match=r"pose\.ckpt: .* one of ClassificationTask, DetectionTask.*, got PoseTask"):
        main(["export", "pose.ckpt", "--format=onnx"])
    torch.save({"weights.of": torch.zeros(3)}, "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: the number of blocks per stage must be .*, got \(0, 0, 0, 0\)"):
        main(["export", "other.pth", "--format=onnx"])
