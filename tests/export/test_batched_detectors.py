"""Batched detectors equal torchvision's, in PyTorch and as exported files."""

import pytest
import torch
from helpers.exports import RUNTIMES, SMALL, save_checkpoint
from torch import nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from shunted_lit.cli import main
from shunted_lit.export.batched_detectors import batch_detector
from shunted_lit.export.targets import detection_error, pad_detections
from shunted_lit.models.detectors import DETECTORS, build_detector
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.tasks import DetectionTask


def spread_scores(detector):
    """Draw random weights for the classifiers: with the initial ones no object is found."""
    torch.manual_seed(1)
    with torch.no_grad():
        if hasattr(detector, "head"):
            nn.init.normal_(detector.head.classification_head.cls_logits.weight, std=0.3)
        else:
            nn.init.normal_(detector.roi_heads.box_predictor.cls_score.weight, std=0.3)
            nn.init.normal_(detector.rpn.head.cls_logits.weight, std=0.3)
    return detector


@pytest.mark.parametrize("name", DETECTORS)
def test_batched_detector_equals_torchvision(name):
    options = {"box_score_thresh": 0.01} if "rcnn" in name else {"score_thresh": 0.01}
    features = FeaturePath("resnet18", levels=(3, 4, 5), neck={"depth": 1, "mlp_ratios": 1})
    sizes = {"pyramid_channels": 32, "extra_levels": 1, "anchor_scale": 0.25, "min_size": 64, "max_size": 128}
    detector = build_detector(name, features, 3, **sizes, **options)
    spread_scores(detector).eval()
    network = batch_detector(detector).eval()
    for size in ((64, 64), (64, 90), (101, 64)):
        images = torch.rand(3, 3, *size)
        with torch.no_grad():
            actual, expected = network(images), detector(list(images))
        assert sum(len(result["scores"]) for result in expected) > 20
        assert detection_error(actual[:3], pad_detections(expected, network.count)) < 1e-4
        for i, result in enumerate(expected if network.has_masks else ()):
            n = len(result["scores"])
            pasted = paste_masks_in_image(actual[3][i, :n, None], actual[0][i, :n], size)[:, 0] >= 0.5
            assert (pasted == result["masks"]).float().mean() > 0.9999


@pytest.mark.parametrize(
    ("name", "format", "neck"),
    [
        pytest.param("fcos", "torch_export", SMALL["neck"], marks=pytest.mark.slow),
        pytest.param("fcos", "openvino", SMALL["neck"], marks=pytest.mark.slow),
        pytest.param("retinanet", "onnx", SMALL["neck"], marks=pytest.mark.slow),
        pytest.param("fcos", "onnx", {"form": "pyramid", "dim": 24}, marks=pytest.mark.slow),
        pytest.param("fcos", "torch_export", {"form": "pyramid", "dim": 24}, marks=pytest.mark.slow),
    ],
)
def test_exported_detector_finds_the_same_objects(name, format, neck):
    # torch.export requires that the coarsest map has more than one row after merging in the neck, hence min_size=96.
    options = {**SMALL, "min_size": 96, "neck": neck, "neck_levels": [3, 4, 5]}
    task = DetectionTask(3, detector=name, extra_levels=0, detector_options={"score_thresh": 0.005}, **options)
    spread_scores(task.detector).eval()
    for layer in (module for name, module in task.named_modules() if ".out_proj." in name):
        nn.init.normal_(layer.weight, std=0.05)  # a neck across levels adds nothing at first
    run, suffix = RUNTIMES[format]
    main(["export", save_checkpoint(task, "best.ckpt"), "--format", format])
    exported = run(f"best{suffix}")
    for batch, height, width in ((1, 96, 120), (2, 125, 96)):
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = task(list(images))
        actual = [torch.from_numpy(out) for out in exported(images)][:3]
        assert (actual[2] > 0).any()
        assert detection_error(actual, pad_detections(expected, actual[2].shape[1])) < 1e-3


def test_detection_error_ignores_the_order_and_nothing_else():
    boxes = torch.tensor([[[0.0, 0, 4, 4], [5, 5, 9, 9], [0, 0, 0, 0]]])
    labels, scores = torch.tensor([[1, 1, 0]]), torch.tensor([[0.5, 0.5, 0]])
    swapped = (boxes[:, [1, 0, 2]], labels, scores)
    assert detection_error((boxes, labels, scores), swapped) == 0
    moved = (boxes + torch.tensor([0, 0, 0.9, 0]), labels, scores)  # 0.9 of 9.9
    assert detection_error((boxes, labels, scores), moved) == pytest.approx(0.9 / 9.9)
    assert detection_error((boxes, labels, scores), (boxes, 1 - labels, scores)) == torch.inf
    fewer = (boxes, labels, torch.tensor([[0.5, 0, 0]]))
    assert detection_error((boxes, labels, scores), fewer) > 0.5, "the nearest one left is far away"
