"""int8 files: what is written, its score, the layers that stay in float32, calibration, and errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.exports import RUNTIMES, SMALL, save_checkpoint
from PIL import Image
from torch import nn

from shunted_lit.cli import main
from shunted_lit.data.shapes import SceneOptions, ShapesDataset
from shunted_lit.export import quantization
from shunted_lit.export.quantization import QuantizationReport, quantize_verified, read_calibration
from shunted_lit.export.targets import build_target
from shunted_lit.models.shunted import ShuntedTransformer
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

ANY_SIZE = {"batch": None, "height": None, "width": None}
SEGMENTER = {"decoder": "fpn", "backbone": "resnet10t", "neck": None,
             "decoder_options": {"pyramid_channels": 32, "segmentation_channels": 32}}  # fmt: skip


def write_images(folder, count=30, side=48):
    """Write drawn scenes, and return them as (count, 3, side, side) in 0..1."""
    options = SceneOptions("boxes", seed=0, size=side, min_extent=6, max_objects=12)
    scenes = ShapesDataset("val", count, options, lambda image, target: image)
    images = torch.stack([scenes[i] for i in range(count)])
    Path(folder).mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(f"{folder}/{i:02d}.png")
    return images.as_subclass(torch.Tensor).float() / 255


def save_labelled_classifier(**backbone):
    """Save a random classifier and images in folders of the classes that it predicts, so that its accuracy is 1."""
    torch.manual_seed(0)
    images = write_images("images")
    task = ClassificationTask(3, **backbone).eval()
    nn.init.normal_(task.model.get_classifier().weight, std=0.5)
    with torch.no_grad():
        features = task.model.forward_head(task.model.forward_features(task.normalize_images(images)), pre_logits=True)
        task.model.get_classifier().bias.copy_(-(features @ task.model.get_classifier().weight.T).mean(0))
        labels = task(images).argmax(1)
    assert len(labels.unique()) == 3, "else a constant would have a high score"
    for i, label in enumerate(labels.tolist()):
        for split in ("train", "val"):
            path = Path(f"labelled/{split}/{label}/{i:02d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Path(f"images/{i:02d}.png").read_bytes())
    save_checkpoint(task, "best.ckpt")
    return task, images, labels


LABELLED = ["--calibration", "images", "--data", "ImageFolderDataModule", "--data.root", "labelled",
            "--data.image_size", "48", "--data.crop_pct", "1.0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_int8_classifier_is_small_and_keeps_its_score(format, capsys):
    small = {"depths": (1, 1, 1, 1), "stem": "patch4"}
    _, images, labels = save_labelled_classifier(backbone="shunted_t", backbone_options=small)
    run, suffix = RUNTIMES[format]
    main(["export", "best.ckpt", "--format", format, "--out", f"float{suffix}"])
    int8 = ["--out", f"int8{suffix}", "--quantize", "int8", "--max_drop", "20", *LABELLED]
    main(["export", "best.ckpt", "--format", format, *int8])
    report = capsys.readouterr().out.splitlines()[-1]
    score = float(re.search(r"val/acc1 1.0000 in float32, (\d\.\d+) in int8", report)[1])
    outputs = torch.from_numpy(run(f"int8{suffix}")(images)[0])
    assert score == pytest.approx((outputs.argmax(1) == labels).float().mean().item(), abs=1e-4)
    expected = torch.from_numpy(run(f"float{suffix}")(images)[0])
    assert 0 < (outputs - expected).abs().max() < 0.2 * expected.abs().max()
    size = {name: sum(file.stat().st_size for file in Path().glob(f"{name}.*")) for name in ("float", "int8")}
    assert size["int8"] < size["float"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_layers_that_cost_the_score_stay_in_float32(format, capsys, caplog):
    task, images, labels = save_labelled_classifier(backbone="test_resnet")
    # One channel is scaled up, and down again by the next convolution. In int8 all other channels are lost.
    block = task.model.layer2[0]
    with torch.no_grad():
        block.bn1.weight[0] = 1
        for parameter in (block.bn1.weight, block.bn1.bias):
            parameter[0] *= 1e5
        block.conv2.weight[:, 0] /= 1e5
        torch.testing.assert_close(task(images).argmax(1), labels)
    save_checkpoint(task, "best.ckpt")
    main(["export", "best.ckpt", "--format", format, "--quantize", "int8", "--max_drop", "5", *LABELLED])
    assert re.search(r"int8 loses [\d.]+ points of val/acc1; looking for the layers", caplog.text)
    report = capsys.readouterr().out.splitlines()[-1]
    assert re.search(r"; in float32 stay \S+", report)
    assert float(re.search(r"([\d.]+) in int8", report)[1]) >= 0.95
    run, suffix = RUNTIMES[format]
    outputs = torch.from_numpy(run(f"best{suffix}")(images)[0])
    assert (outputs.argmax(1) == labels).float().mean() >= 0.95


def test_nothing_is_written_where_the_score_falls(monkeypatch):
    target = build_target("neck", "model", None, {"cin": 8, "depth": 1})
    report = QuantizationReport("", "val/map", 0.5, 0.48)
    monkeypatch.setattr(quantization, "quantize_file", lambda *_: report)
    with pytest.raises(ValueError, match=r"val/map may fall by at most 1 points .* got 0.5000 in float32 and 0.48"):
        quantize_verified(target, "onnx", Path("float.onnx"), [], None, 1.0)
    assert quantize_verified(target, "onnx", Path("float.onnx"), [], None, 2.5) == report


def make_tasks():
    torch.manual_seed(0)
    options = {"score_thresh": 0.005, "detections_per_img": 30}
    rcnn = {"box_score_thresh": 0.2, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 10}
    small = {**SMALL, "extra_levels": 0}
    return {
        "classification": ClassificationTask(3, backbone="test_resnet"),
        "detection": DetectionTask(3, detector="fcos", detector_options=options, **small),
        "masks": DetectionTask(3, detector="mask_rcnn", detector_options=rcnn, **small),
        "segmentation": SegmentationTask(3, **SEGMENTER, short_side=64),
        "windows": SegmentationTask(3, **SEGMENTER, window=40),
    }


@pytest.mark.parametrize("kind", ["classification", "detection", "masks", "segmentation", "windows"])
def test_scores_are_computed_as_in_validation(kind):
    """The task gives the same predictions where an exported file runs in place of its network."""
    task = make_tasks()[kind].eval()
    for name, parameter in task.named_parameters():
        if name.endswith(("cls_logits.weight", "cls_score.weight")):
            nn.init.normal_(parameter, std=0.3)
    target = build_target(save_checkpoint(task, "best.ckpt"), "model", None, None)
    network = target.network.eval()

    def run(x):
        outputs = network(x)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs

    images = [torch.rand(3, 70, 90), torch.rand(3, 64, 64), torch.rand(3, 200, 96)]
    images = torch.rand(2, 3, 48, 48) if kind == "classification" else images
    with torch.no_grad():
        actual, expected = target.forward(run)(images), task(images)
    if kind == "masks":
        for found, result in zip(actual, expected, strict=True):
            assert len(result["scores"])
            assert found["masks"].shape == result["masks"].shape
            assert (found.pop("masks") == result.pop("masks")).float().mean() > 0.999
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


def test_images_are_prepared_as_in_evaluation():
    write_images("images", 10, side=80)
    tasks = make_tasks()
    shapes = {}
    for kind, task in tasks.items():
        target = build_target(save_checkpoint(task, f"{kind}.ckpt"), "model", None, None)
        inputs = read_calibration(Path("images"), target, ANY_SIZE)
        assert len(inputs) == 10
        assert 0 <= min(x.min() for x in inputs) < 0.3 < 0.5 < max(x.max() for x in inputs) <= 1.01
        shapes[kind] = tuple(inputs[0].shape)
    assert shapes == {
        "classification": (1, 3, 160, 160), "detection": (1, 3, 64, 64), "masks": (1, 3, 64, 64),
        "segmentation": (1, 3, 64, 64), "windows": (1, 3, 40, 40),
    }  # fmt: skip
    fixed = {"batch": 2, "height": 32, "width": 48}
    assert read_calibration(Path("images"), target, fixed)[0].shape == (2, 3, 32, 48)
    backbone = build_target("shunted_t", "model", None, {"num_classes": 2})
    normalized = read_calibration(Path("images"), backbone, ANY_SIZE)
    assert normalized[0].shape == (1, 3, 224, 224)
    assert min(x.min() for x in normalized) < -1


def test_a_neck_is_calibrated_on_features():
    write_images("images", 10)
    task = make_tasks()["detection"].eval()
    target = build_target(save_checkpoint(task, "best.ckpt"), "neck", None, None)
    expected = []
    (neck,) = [module for module in task.modules() if isinstance(module, ShuntedTransformer)]
    neck.register_forward_pre_hook(lambda _, inputs: expected.append(inputs[0]))
    for path in sorted(Path("images").iterdir()):
        image = torch.from_numpy(np.asarray(Image.open(path)).transpose(2, 0, 1) / np.float32(255))
        with torch.no_grad():
            task([image])
    torch.testing.assert_close(read_calibration(Path("images"), target, ANY_SIZE), expected, rtol=1e-4, atol=1e-5)

    Path("features").mkdir()
    arrays = [np.random.default_rng(i).normal(size=(8, 5, 6 + i)) for i in range(12)]
    for i, array in enumerate(arrays):
        np.save(f"features/{i:02d}.npy", array)
    alone = build_target("neck", "model", None, {"cin": 8, "depth": 1})
    for x, array in zip(read_calibration(Path("features"), alone, ANY_SIZE), arrays, strict=True):
        np.testing.assert_allclose(x[0], array, rtol=1e-6)


def test_invalid_calibration_raises(monkeypatch):
    write_images("few", 3)
    Path("features").mkdir()
    for i in range(10):
        np.save(f"features/{i}.npy", np.zeros((4, 5, 5)))
    gray = build_target("shunted_t", "model", None, {"in_chans": 1})
    neck = build_target("neck", "model", None, {"cin": 8, "depth": 1})
    for folder, target, message in (
        (None, neck, "int8 needs a folder of images as `calibration`, at least 10, got None"),
        (Path("none"), neck, "got none; name one"),
        (Path("few"), build_target("shunted_t", "model", None, None), "at least 10 images, got 3 in few; add some"),
        (Path("few"), neck, "at least 10 features as .npy files, got 0 in few"),
        (Path("features"), neck, r"0.npy: must have the shape \(8, H, W\) for this network, got \[4, 5, 5\]"),
    ):
        with pytest.raises(ValueError, match=message):
            read_calibration(folder, target, ANY_SIZE)
    write_images("images", 10)
    with pytest.raises(ValueError, match=r"must have the shape \(1, H, W\) for this network, got \[3, 224, 224\]"):
        read_calibration(Path("images"), gray, ANY_SIZE)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format=onnx", "--calibration=images"], "`calibration` and `data` are for int8; add --quantize int8"),
        (["--format=torch_export", "--quantize=int8"], "int8 needs the format openvino or onnx, got torch_export"),
        (["--format=onnx", "--quantize=int8"], "int8 needs a folder of images as `calibration`"),
        (["--format=onnx", "--quantize=int8", "--max_drop=-1"], "`max_drop` must be at least 0, got -1"),
        (["--format=onnx", "--quantize=int8", "--calibration=features", "--data=ShapesDataModule"],
         "`data` scores the task of a checkpoint, but this source has none; leave it out"),
    ],
)  # fmt: skip
def test_invalid_options_raise(words, message):
    Path("features").mkdir()
    for i in range(10):
        np.save(f"features/{i}.npy", np.zeros((8, 5, 5)))
    with pytest.raises(ValueError, match=message):
        main(["export", "neck", "--options={cin: 8, depth: 1}", *words])
    assert not Path("neck.onnx").exists()


def test_missing_quantizer_names_the_extra_to_install(monkeypatch):
    find_spec = quantization.importlib.util.find_spec
    monkeypatch.setattr(
        quantization.importlib.util, "find_spec", lambda name: None if name == "nncf" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"int8 needs nncf: pip install 'shunted-lit\[quantize\]'"):
        main(["export", "neck", "--format=onnx", "--quantize=int8", "--calibration=images"])


def test_data_must_fit_the_task():
    task = make_tasks()["detection"]
    save_checkpoint(task, "best.ckpt")
    write_images("images", 10)
    Path("labelled/train/a").mkdir(parents=True)
    words = ["--calibration=images", "--data=ImageFolderDataModule", "--data.root=labelled"]
    with pytest.raises(ValueError, match="DetectionTask learns from boxes, but ImageFolderDataModule has class"):
        main(["export", "best.ckpt", "--format=onnx", "--quantize=int8", *words])
    main(["scenes", "scenes", "--train=2", "--val=2", "--size=64"])
    words = ["--calibration=images", "--data=YoloDataModule", "--data.data=scenes/data.yaml", "--data.slices=32"]
    with pytest.raises(ValueError, match=r"`data.slices` must be null for export: the exported network takes whole"):
        main(["export", "best.ckpt", "--format=onnx", "--quantize=int8", *words])
