"""Exported files, run by their own runtimes, equal PyTorch."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.exports import RUNTIMES, SMALL, run_onnx, save_checkpoint
from helpers.golden_cases import CASES, OUTPUTS, draw, reference_weights

from shunted_lit import ShuntedTransformer
from shunted_lit.cli import main
from shunted_lit.export import formats
from shunted_lit.export.targets import neck_target
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask


@pytest.mark.parametrize(
    "format",  # openvino converts the file that onnx writes
    [pytest.param("onnx", marks=pytest.mark.slow), "openvino", "torch_export"],
)
def test_neck_runs_at_sizes_that_were_not_checked(format, capsys):
    case = CASES["neck_small_sr4"]
    torch.save({"model": reference_weights(case)}, "reference.pth")
    run, suffix = RUNTIMES[format]
    main(["export", "reference.pth", "--format", format, "--out", f"neck{suffix}"])
    assert "of PyTorch at three sizes" in capsys.readouterr().out
    neck, exported = ShuntedTransformer.from_checkpoint("reference.pth"), run(f"neck{suffix}")
    smallest = 5 if format == "torch_export" else 1  # torch.export requires maps of more than one merged row
    for batch, height, width in ((1, smallest, 31), (4, 17, smallest), (2, 64, 48)):
        x = torch.randn(batch, neck.cin, height, width)
        with torch.no_grad():
            np.testing.assert_allclose(exported(x)[0], neck(x).numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        ["reference.pth", f"neck{suffix}"] + (["neck.bin"] if format == "openvino" else [])
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_backbone_gives_the_golden_outputs(format):
    case = CASES["shunted_t"]
    torch.save(reference_weights(case), "ckpt_T.pth")
    run, suffix = RUNTIMES[format]
    main(["export", "ckpt_T.pth", "--format", format])
    out = run(f"ckpt_T{suffix}")(draw(case["salt"] + 1, case["input_shape"]))[0]
    sample = torch.from_numpy(out).flatten()[:: case["sample_stride"]]
    torch.testing.assert_close(sample, OUTPUTS["shunted_t/output"], rtol=0, atol=2e-5)


def test_fixed_sizes_are_the_only_accepted_ones():
    main(["export", "neck", "--format=onnx", "--options={cin: 8, depth: 1}", "--batch=1", "--height=1", "--width=7"])
    run = run_onnx("neck.onnx")
    assert run(torch.randn(1, 8, 1, 7))[0].shape == (1, 8, 1, 7)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT"):
        run(torch.randn(1, 8, 2, 7))


def test_classifier_takes_plain_images_and_stores_its_class_names():
    import onnx

    task = ClassificationTask(3, ["a", "b", "c"], backbone="test_resnet").eval()
    main(["export", save_checkpoint(task, "best.ckpt"), "--format=onnx"])
    x = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        np.testing.assert_allclose(run_onnx("best.onnx")(x)[0], task(x).numpy(), rtol=1e-4, atol=1e-4)
    metadata = {entry.key: entry.value for entry in onnx.load("best.onnx").metadata_props}
    assert json.loads(metadata["names"]) == ["a", "b", "c"]


def test_neck_in_safetensors_keeps_its_heads_and_scale():
    task = DetectionTask(2, **{**SMALL, "neck": {"depth": 1, "num_heads": 4, "ratios": [4, 1]}})
    main(["export", save_checkpoint(task, "best.ckpt"), "--part=neck", "--out=neck"])
    loaded = ShuntedTransformer.from_checkpoint("neck/model.safetensors")
    x = torch.randn(1, 512, 6, 5)
    torch.testing.assert_close(loaded(x), task.detector.backbone.body.necks["5"].eval()(x), rtol=0, atol=0)
    neck = ShuntedTransformer(cin=16, depth=2, num_heads=4, ratios=(4, 2, 1, 1), qk_scale=0.3).eval()
    neck_target(neck).save_weights(Path("other"))
    x = torch.randn(1, 16, 6, 5)
    torch.testing.assert_close(ShuntedTransformer.from_checkpoint("other/model.safetensors")(x), neck(x))
    torch.testing.assert_close(ShuntedTransformer.from_pretrained("other")(x), neck(x))


def test_reference_weights_in_safetensors_load_by_timm(tmp_path):
    torch.save({"model": reference_weights(CASES["shunted_t"])}, "ckpt_T.pth")
    main(["export", "ckpt_T.pth", "--out", str(tmp_path / "out")])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = timm.create_model("shunted_t", checkpoint_path="ckpt_T.pth")
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("backbone", ["shunted_t", pytest.param("test_resnet", marks=pytest.mark.slow)])
def test_a_classifier_in_safetensors_loads_in_timm_and_transformers(backbone, tmp_path):
    import transformers

    options = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 64)} if backbone == "shunted_t" else {}
    task = ClassificationTask(3, ["cat", "dog", "owl"], backbone=backbone, backbone_options=options).eval()
    main(["export", save_checkpoint(task, "best.ckpt"), "--out=out"])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = task.model(x)
        timm_model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        torch.testing.assert_close(timm_model(x), expected, rtol=0, atol=0)
        model = transformers.AutoModelForImageClassification.from_pretrained("out")
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=0)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}


@pytest.mark.parametrize("classes", [0, 7])
def test_a_backbone_in_safetensors_keeps_its_classes_and_channels(classes, tmp_path):
    main(["export", "shunted_t", f"--options={{num_classes: {classes}, in_chans: 1}}", "--out=out"])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert (model.num_classes, model.in_chans) == (classes, 1)


@pytest.mark.parametrize(
    ("decoder", "format"),
    [
        pytest.param("fpn", "onnx", marks=pytest.mark.slow),
        pytest.param("upernet", "openvino", marks=pytest.mark.slow),
        pytest.param("segformer", "torch_export", marks=pytest.mark.slow),
    ],
)
def test_segmenter_equals_pytorch(decoder, format):
    task = SegmentationTask(4, decoder=decoder, backbone="resnet18", neck={"depth": 1, "mlp_ratios": 1}).eval()
    run, suffix = RUNTIMES[format]
    main(["export", save_checkpoint(task, "best.ckpt"), "--format", format])
    exported = run(f"best{suffix}")
    for batch, height, width in ((1, 101, 140), (2, 128, 161)):
        x = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = task.segmenter(x).numpy()
        np.testing.assert_allclose(exported(x)[0], expected, rtol=1e-3, atol=1e-4)


def test_file_that_differs_from_pytorch_is_not_kept(monkeypatch):
    wrong = replace(formats.FORMATS["torch_export"], load=lambda path, precision: lambda x: [x + 1])
    monkeypatch.setitem(formats.FORMATS, "torch_export", wrong)
    with pytest.raises(ValueError, match=r"neck\.pt2 is not written: .* differ from PyTorch's by at most 0\.001, got"):
        main(["export", "neck", "--format=torch_export", "--options={cin: 8, depth: 1}"])
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_signals_can_be_handled_after_several_openvino_models():
    """With a core per model, deleting the first one before the second made the next signal a segmentation fault."""
    code = """
import os, signal
from pathlib import Path
from shunted_lit.export.formats import load_openvino
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first = load_openvino(Path("neck.xml"))
second = load_openvino(Path("neck.xml"))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    main(["export", "neck", "--format=openvino", "--options={cin: 16, depth: 1, num_heads: 2}"])
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n")


@pytest.mark.slow
def test_package_imports_without_the_runtimes():
    code = "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxscript', 'onnxruntime', 'openvino'])); "
    code += "import shunted_lit.cli, shunted_lit.export.formats"
    subprocess.run([sys.executable, "-c", code], check=True)
