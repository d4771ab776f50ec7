"""Exports, run by the runtimes that they are for and compared with PyTorch and with torchvision's own detectors."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.golden_cases import CASES, OUTPUTS, draw, reference_weights
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from shunted_lit import ShuntedTransformer
from shunted_lit.cli import main
from shunted_lit.export import formats as export
from shunted_lit.export.batched_detectors import batched
from shunted_lit.models.detectors import DETECTORS, build_detector
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

SMALL = {
    "backbone": "resnet18", "neck": {"depth": 1, "mlp_ratios": 1}, "levels": [3, 4, 5], "pyramid_channels": 32,
    "min_size": 64, "max_size": 128, "anchor_scale": 0.25,
}  # fmt: skip


def onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {session.get_inputs()[0].name: x.numpy()})


def openvino_(path):
    model = export.openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: [out.copy() for out in model(x.numpy()).values()]


def torch_export(path):
    module = torch.export.load(path).module()

    def run(x):
        out = module(x)
        return [part.detach().numpy() for part in ((out,) if torch.is_tensor(out) else out)]

    return run


RUNTIMES = {"onnx": (onnx, ".onnx"), "openvino": (openvino_, ".xml"), "torch_export": (torch_export, ".pt2")}


def checkpoint(task, path):
    """What `fit` leaves of a task, without a run."""
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams),
        "pytorch-lightning_version": "2.6",
    }
    task.on_save_checkpoint(content)
    torch.save(content, path)
    return str(path)


def spread_scores(detector):
    """Random weights that find something: as made, a head finds no object anywhere."""
    torch.manual_seed(1)
    with torch.no_grad():
        if hasattr(detector, "head"):
            nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.3)
        else:
            nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.3)
            nn.init.normal_(detector.rpn.head.cls_logits.weight, std=0.3)
    return detector


# --- networks with one map or vector out


@pytest.mark.parametrize("format", RUNTIMES)
def test_neck_of_the_source_at_other_sizes_than_those_checked(format, tmp_path, capsys):
    case = CASES["neck_small_sr4"]
    torch.save({"model": reference_weights(case)}, "source.pth")
    run, suffix = RUNTIMES[format]
    main(["export", "source.pth", "--format", format, "--out", f"neck{suffix}"])
    assert "of PyTorch at three sizes" in capsys.readouterr().out
    neck, exported = ShuntedTransformer.from_checkpoint("source.pth"), run(f"neck{suffix}")
    least = 5 if format == "torch_export" else 1  # its programs refuse maps of a single merged row
    for batch, height, width in ((1, least, 31), (4, 17, least), (2, 64, 48)):
        x = torch.randn(batch, neck.cin, height, width)
        with torch.no_grad():
            np.testing.assert_allclose(exported(x)[0], neck(x).numpy(), rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in Path().iterdir()) == sorted(
        ["source.pth", f"neck{suffix}"] + (["neck.bin"] if format == "openvino" else [])
    )


@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_backbone_gives_the_golden_outputs(format):
    case = CASES["shunted_t"]
    torch.save(reference_weights(case), "ckpt_T.pth")
    run, suffix = RUNTIMES[format]
    main(["export", "ckpt_T.pth", "--format", format])
    out = run(f"ckpt_T{suffix}")(draw(case["salt"] + 1, case["input_shape"]))[0]
    sample = torch.from_numpy(out).flatten()[:: case["sample_stride"]]
    torch.testing.assert_close(sample, OUTPUTS["shunted_t/output"], rtol=0, atol=2e-5)


def test_fixed_sizes_are_the_only_ones():
    main(["export", "neck", "--format=onnx", "--options={cin: 8, depth: 1}", "--batch=1", "--height=1", "--width=7"])
    run = onnx("neck.onnx")
    assert run(torch.randn(1, 8, 1, 7))[0].shape == (1, 8, 1, 7)
    with pytest.raises(Exception, match=r"INVALID_ARGUMENT"):
        run(torch.randn(1, 8, 2, 7))


def test_classifier_takes_plain_images_and_tells_its_classes():
    import onnx as package

    task = ClassificationTask(3, ["a", "b", "c"], backbone_options={"depths": (1, 1, 1, 1)}).eval()
    main(["export", checkpoint(task, "best.ckpt"), "--format=onnx"])
    x = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        np.testing.assert_allclose(onnx("best.onnx")(x)[0], task(x).numpy(), rtol=1e-4, atol=1e-4)
    metadata = {entry.key: entry.value for entry in package.load("best.onnx").metadata_props}
    assert json.loads(metadata["names"]) == ["a", "b", "c"]


def test_neck_in_safetensors_comes_back_with_its_heads():
    neck = ShuntedTransformer(cin=16, depth=2, num_heads=4, ratios=(4, 2, 1, 1), qk_scale=0.3).eval()
    task = DetectionTask(2, **{**SMALL, "neck": {"depth": 1, "num_heads": 4, "ratios": [4, 1]}})
    main(["export", checkpoint(task, "best.ckpt"), "--part=neck", "--out=neck"])
    again = ShuntedTransformer.from_checkpoint("neck/model.safetensors")
    x = torch.randn(1, 512, 6, 5)
    torch.testing.assert_close(again(x), task.detector.backbone.body.necks["5"].eval()(x), rtol=0, atol=0)
    export.neck_parts(neck).save(Path("other"))
    x = torch.randn(1, 16, 6, 5)
    torch.testing.assert_close(ShuntedTransformer.from_checkpoint("other/model.safetensors")(x), neck(x))


def test_export_of_the_authors_weights(tmp_path):
    torch.save({"model": reference_weights(CASES["shunted_s"])}, "ckpt_S.pth")
    main(["export", "ckpt_S.pth", "--out", str(tmp_path / "out")])
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = timm.create_model("shunted_s", checkpoint_path="ckpt_S.pth")
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("decoder", "format"), [("fpn", "onnx"), ("upernet", "openvino"), ("segformer", "torch_export")]
)
def test_segmenters(decoder, format):
    task = SegmentationTask(4, decoder=decoder, backbone="resnet18", neck={"depth": 1, "mlp_ratios": 1}).eval()
    run, suffix = RUNTIMES[format]
    main(["export", checkpoint(task, "best.ckpt"), "--format", format])
    exported = run(f"best{suffix}")
    for batch, height, width in ((1, 101, 140), (2, 128, 161)):
        x = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = task.segmenter(x).numpy()
        np.testing.assert_allclose(exported(x)[0], expected, rtol=1e-3, atol=1e-4)


# --- detectors


@pytest.mark.parametrize("name", DETECTORS)
def test_batched_detectors_equal_torchvisions(name):
    options = {"box_score_thresh": 0.01} if "rcnn" in name else {"score_thresh": 0.01}
    features = FeaturePath("resnet18", levels=(3, 4, 5), neck={"depth": 1, "mlp_ratios": 1})
    detector = build_detector(name, features, 3, 32, 1, 0.25, 64, 128, **options)
    spread_scores(detector).eval()
    network = batched(detector).eval()
    for size in ((64, 64), (64, 90), (101, 64)):
        images = torch.rand(3, 3, *size)
        with torch.no_grad():
            found, expected = network(images), detector(list(images))
        assert sum(len(result["scores"]) for result in expected) > 20
        assert export.detection_error(found[:3], export.padded(expected, network.count)) < 1e-4
        for i, result in enumerate(expected if network.has_masks else ()):
            n = len(result["scores"])
            pasted = paste_masks_in_image(found[3][i, :n, None], found[0][i, :n], size)[:, 0] >= 0.5
            assert (pasted == result["masks"]).float().mean() > 0.9999


FOUND = [("fcos", "openvino"), ("fcos", "torch_export"), ("retinanet", "onnx")]


@pytest.mark.parametrize(("name", "format"), FOUND)
def test_trained_detectors_find_the_same(name, format):
    options = {"box_score_thresh": 0.01} if "rcnn" in name else {"score_thresh": 0.005}
    # torch_export's programs take no image whose coarsest map, as the neck merges it, is a single row.
    task = DetectionTask(3, detector=name, extra_levels=0, detector_options=options, **{**SMALL, "min_size": 96})
    spread_scores(task.detector).eval()
    run, suffix = RUNTIMES[format]
    main(["export", checkpoint(task, "best.ckpt"), "--format", format])
    exported = run(f"best{suffix}")
    for batch, height, width in ((1, 96, 120), (2, 125, 96)):
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = task(list(images))
        found = [torch.from_numpy(out) for out in exported(images)][:3]
        assert (found[2] > 0).any()
        assert export.detection_error(found, export.padded(expected, found[2].shape[1])) < 1e-3


def test_detections_in_another_order_are_the_same_and_others_are_not():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [5, 5, 9, 9], [0, 0, 0, 0]]])
    labels, scores = torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 0.5, 0]])
    swapped = (boxes[:, [1, 0, 2]], labels, scores)
    assert export.detection_error((boxes, labels, scores), swapped) == 0
    moved = (boxes + torch.tensor([0, 0, 0.9, 0]), labels, scores)  # 0.9 of 9.9
    assert export.detection_error((boxes, labels, scores), moved) == pytest.approx(0.9 / 9.9)
    assert export.detection_error((boxes, labels, scores), (boxes, 1 - labels, scores)) == torch.inf
    fewer = (boxes, labels, torch.tensor([[0.5, 0, 0]]))
    assert export.detection_error((boxes, labels, scores), fewer) > 0.5, "the nearest one left is far off"


# --- what can't be done is told before it is begun


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.ckpt", "--format=onnx"], "nothing.ckpt is neither a file nor one of neck, shunted_t"),
        (["neck", "--format=onnx", "--height=0"], "height is 0, but at least 1 is needed"),
        (["neck", "--format=onnx", "--out=neck.xml"], r"neck.xml does not end in \.onnx"),
        (["neck", "--height=3"], "safetensors holds weights alone"),
        (["neck", "--format=onnx", "--options={cin: 9}"], "9 channels do not split into 2 heads"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(ValueError, match=message):
        main(["export", *words])
    assert not list(Path().iterdir())


def test_unknown_format_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit) as done:
        main(["export", "neck", "--format=tensorrt"])
    assert done.value.code == 2
    assert "'onnx', 'openvino', 'torch_export', 'safetensors'" in capsys.readouterr().err


def test_missing_runtime_names_its_extra(monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(ValueError, match=r"openvino needs openvino: pip install 'shunted-lit\[export\]'"):
        main(["export", "neck", "--format=openvino"])


def test_the_package_imports_without_any_runtime():
    code = "import sys; sys.modules.update(dict.fromkeys(['onnx', 'onnxscript', 'onnxruntime', 'openvino'])); "
    code += "import shunted_lit.cli"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_signals_are_handled_after_openvino():
    """A model that goes before the one that came after it, then a signal: a segmentation fault with a core for each."""
    code = """
import os, signal
from pathlib import Path
from shunted_lit.export.formats import run_openvino
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
first = run_openvino(Path("neck.xml"))
second = run_openvino(Path("neck.xml"))
del first
del second
os.kill(os.getpid(), signal.SIGUSR1)
"""
    main(["export", "neck", "--format=openvino", "--options={cin: 16, depth: 1, num_heads: 2}"])
    done = subprocess.run([sys.executable, "-X", "faulthandler", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n")


def test_nothing_is_written_over():
    Path("neck.onnx").write_text("mine")
    with pytest.raises(ValueError, match=r"neck\.onnx is there already"):
        main(["export", "neck", "--format=onnx"])
    assert Path("neck.onnx").read_text() == "mine"
    Path("folder").mkdir()
    Path("folder/mine").touch()
    with pytest.raises(ValueError, match="not empty; choose a new folder"):
        main(["export", "shunted_t", "--out=folder"])


def test_a_wrong_export_leaves_no_file(monkeypatch):
    wrong = export.Format(export.write_torch_export, lambda path: lambda x: [x + 1], (".pt2",))
    monkeypatch.setitem(export.FORMATS, "torch_export", wrong)
    with pytest.raises(ValueError, match=r"neck\.pt2 is not written: its outputs differ from PyTorch's by"):
        main(["export", "neck", "--format=torch_export", "--options={cin: 8, depth: 1}"])
    assert not list(Path().iterdir())


def test_checkpoints_that_can_not_be_exported_so():
    task = DetectionTask(2, **SMALL)
    with pytest.raises(ValueError, match="safetensors is for classifiers, backbones and necks"):
        main(["export", checkpoint(task, "best.ckpt")])
    with pytest.raises(ValueError, match="options are for models by name"):
        main(["export", "best.ckpt", "--format=onnx", "--options={cin: 8}"])
    content = torch.load("best.ckpt", weights_only=True)
    torch.save({**content, "task": "PoseTask"}, "pose.ckpt")
    with pytest.raises(ValueError, match=r"pose\.ckpt is of PoseTask, but only ClassificationTask, DetectionTask"):
        main(["export", "pose.ckpt", "--format=onnx"])
    torch.save({"weights.of": torch.zeros(3)}, "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds no backbone: blocks a stage are \(0, 0, 0, 0\)"):
        main(["export", "other.pth", "--format=onnx"])
