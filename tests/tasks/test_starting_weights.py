"""Tasks that start from the weights of a run: other classes, a new neck, other file formats, what does not fit."""

import pytest
import safetensors.torch
import torch

from shunted_lit.cli import main
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

SMALL = {"pyramid_channels": 64, "min_size": 64, "max_size": 64}
DETECTORS = {
    "fcos": ["head.classification_head.cls_logits"],
    "retinanet": ["head.classification_head.cls_logits"],
    "faster_rcnn": ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"],
    "mask_rcnn": [
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_predictor.mask_fcn_logits",
    ],
}


def save(task, path, **more):
    """Write what a Lightning checkpoint holds of a task; return its path."""
    names = {"task": type(task).__name__, "class_names": task.class_names, "hyper_parameters": dict(task.hparams)}
    torch.save({"state_dict": task.state_dict(), **names, **more}, path)
    return str(path)


def changed_tensors(task, weights):
    """Return the names of the tensors that differ from those of the file."""
    given = torch.load(weights, weights_only=True)["state_dict"]
    return {name for name, value in task.state_dict().items() if name not in given or not value.equal(given[name])}


@pytest.mark.parametrize("detector", DETECTORS)
def test_detector_with_other_classes_loads_all_but_its_head(detector, tmp_path, caplog):
    weights = save(DetectionTask(5, detector=detector, **SMALL), tmp_path / "run.ckpt")
    with caplog.at_level("INFO"):
        task = DetectionTask(3, detector=detector, weights=weights, **SMALL)
    layers = {f"detector.{layer}" for layer in DETECTORS[detector]}
    assert {name.rpartition(".")[0] for name in changed_tensors(task, weights)} <= layers
    assert all(f"{layer}.weight" in changed_tensors(task, weights) for layer in layers)
    total = len(task.state_dict())
    report = f"loaded {total - 2 * len(layers)} of the model's {total} tensors; not loaded: the head"
    assert f"{weights}: {report} (the file has other classes)" in caplog.text


@pytest.mark.parametrize("decoder", ["fpn", "upernet", "segformer"])
def test_segmenter_with_new_neck_and_auxiliary_head_loads_the_rest(decoder, tmp_path, caplog):
    options = {"decoder": decoder, "backbone": "resnet18"}
    weights = save(SegmentationTask(4, **options), tmp_path / "run.ckpt")
    with caplog.at_level("INFO"):
        more = {"neck": {"depth": 1}, "neck_levels": [4, 5], "auxiliary_weight": 0.4}
        task = SegmentationTask(7, weights=weights, **more, **options)
    new = ("segmenter.features.necks.4.", "segmenter.features.necks.5.", "segmenter.auxiliary.", "segmenter.head.")
    assert all(name.startswith(new) for name in changed_tensors(task, weights))
    assert all(any(name.startswith(prefix) for name in changed_tensors(task, weights)) for prefix in new)
    names = "segmenter.features.necks.4, segmenter.features.necks.5, segmenter.auxiliary, the head"
    assert f"not loaded: {names}" in caplog.text


@pytest.mark.parametrize("neck", [{"depth": 1}, {"form": "light"}, {"form": "pyramid"}, {"layer_scale": 0.0}])
def test_a_new_neck_in_a_trained_detector_keeps_its_outputs(neck, tmp_path):
    before = DetectionTask(2, **SMALL).eval()
    weights = save(before, tmp_path / "run.ckpt")
    after = DetectionTask(2, weights=weights, neck=neck, neck_levels=[4, 5], **SMALL).eval()
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        for one, other in zip(before([image]), after([image]), strict=True):
            assert all(one[key].equal(other[key]) for key in one)
    rebuilt = DetectionTask(**after.hparams)
    assert rebuilt.state_dict().keys() == after.state_dict().keys(), "a checkpoint is loaded by its hyperparameters"


def test_a_neck_can_also_start_otherwise_and_a_trained_one_stays(tmp_path):
    weights = save(DetectionTask(2, **SMALL), tmp_path / "run.ckpt")
    task = DetectionTask(2, weights=weights, neck={"depth": 1, "identity_start": False}, **SMALL)
    assert not hasattr(task.detector.backbone.body.necks["5"].out_proj, "weight")
    with_neck = save(task, tmp_path / "with_neck.ckpt")
    assert not changed_tensors(DetectionTask(2, weights=with_neck, neck={"depth": 1}, **SMALL), with_neck)


def test_equal_number_of_classes_loads_everything_and_warns_of_other_names(tmp_path, caplog):
    weights = save(DetectionTask(2, ["cat", "dog"], **SMALL), tmp_path / "run.ckpt")
    assert not changed_tensors(DetectionTask(2, ["cat", "dog"], weights=weights, **SMALL), weights)
    assert "in the file and" not in caplog.text
    assert not changed_tensors(DetectionTask(2, ["cat", "cow"], weights=weights, **SMALL), weights)
    assert "class 1 is 'dog' in the file and 'cow' here; classes take the weights of the same number" in caplog.text


def test_weights_that_do_not_fit_are_refused_with_the_settings_that_differ(tmp_path):
    weights = save(DetectionTask(2, **SMALL), tmp_path / "run.ckpt")
    for option, message in {
        "pyramid_channels": "pyramid_channels is 64 in the file, 96 here",
        "extra_levels": "extra_levels is 2 in the file, 1 here",
        "backbone": "backbone is 'resnet18' in the file, 'resnet10t' here",
        "detector": "detector is 'fcos' in the file, 'retinanet' here",
    }.items():
        value = {"pyramid_channels": 96, "extra_levels": 1, "backbone": "resnet10t", "detector": "retinanet"}[option]
        with pytest.raises(
            ValueError, match=rf"run\.ckpt: weights do not fit: \d+ .*Settings that differ: .*{message}"
        ):
            DetectionTask(2, weights=weights, **{**SMALL, option: value})
    for task in (SegmentationTask, ClassificationTask):
        with pytest.raises(
            ValueError, match=r"run\.ckpt: a checkpoint of DetectionTask can only start a DetectionTask"
        ):
            task(2, backbone="resnet18", weights=weights)
    with pytest.raises(ValueError, match="`pretrained` must be false where `weights` is given"):
        DetectionTask(2, weights=weights, pretrained=True, **SMALL)
    torch.save({"state_dict": {1: torch.zeros(1)}}, tmp_path / "numbers.ckpt")
    with pytest.raises(ValueError, match="must hold weights by name"):
        DetectionTask(2, weights=str(tmp_path / "numbers.ckpt"), **SMALL)


def test_safetensors_of_a_detector_load(tmp_path):
    task = DetectionTask(2, **SMALL)
    weights = save(task, tmp_path / "run.ckpt")
    file = tmp_path / "run.safetensors"
    safetensors.torch.save_file({name: value.contiguous() for name, value in task.state_dict().items()}, file)
    assert not changed_tensors(DetectionTask(2, weights=str(file), **SMALL), weights)


@pytest.mark.slow
def test_fit_from_weights_is_a_new_run_with_a_new_optimizer():
    args = ["fit", "--model=DetectionTask", "--data=ShapesDataModule", "--data.train_size=8", "--data.val_size=2",
             "--data.size=32", "--data.num_workers=0", "--data.batch_size=4", "--model.min_size=32",
             "--model.max_size=32", "--model.pyramid_channels=64", "--trainer.max_epochs=1", "--model.lr=1e-12",
             "--model.min_lr=0", "--trainer.enable_progress_bar=false"]  # fmt: skip
    first = main(args).trainer
    best = f"{first.log_dir}/checkpoints/best.ckpt"
    second = main([*args, f"--model.weights={best}"]).trainer
    assert second.log_dir != first.log_dir
    assert second.global_step == 2, "steps count from 0"
    trained, given = second.lightning_module.state_dict(), torch.load(best, weights_only=True)["state_dict"]
    moved = [n for n in given if not n.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.allclose(trained[name], given[name], atol=1e-6) for name in moved)
