"""Segmenters over the feature path: sizes, windows, gradients, scores and arguments of the task."""

import csv
import inspect
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from helpers.runs import QUIET, fit

from shunted_lit.cli import main
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.models.segmenters import DECODERS, LEVELS, Segmenter, segment, segment_windows, window_starts
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask

SMALL_NECK = {"depth": 1, "mlp_ratios": 1}
SMALL_BACKBONE = {"depths": (1, 1, 1, 1), "stem": "patch4"}  # of shunted_t
NARROW = {
    "fpn": {"pyramid_channels": 32, "segmentation_channels": 64},
    "upernet": {"decoder_channels": 32},
    "segformer": {"segmentation_channels": 64},
}


def small_segmenter(decoder, backbone_options=SMALL_BACKBONE, **keywords):
    torch.manual_seed(0)
    features = FeaturePath("shunted_t", levels=LEVELS, backbone_options=backbone_options)
    return Segmenter(decoder, features, 4, **NARROW[decoder], **keywords)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
@pytest.mark.parametrize("size", [(64, 64), (65, 40), (1, 1), (31, 97)])
def test_logits_have_the_size_of_the_image(decoder, size):
    segmenter = small_segmenter(decoder).eval()
    with torch.no_grad():
        assert segmenter(torch.rand(2, 3, *size)).shape == (2, 4, *size)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_images_are_padded_with_normalized_zeros(decoder):
    segmenter = small_segmenter(decoder).eval()
    images = torch.rand(1, 3, 40, 70)
    mean = segmenter.mean.expand(1, 3, 64, 96).clone()  # 0 once normalized
    mean[..., :40, :70] = images
    with torch.no_grad():
        torch.testing.assert_close(segmenter(images), segmenter(mean)[..., :40, :70], rtol=0, atol=1e-5)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_logits_equal_those_of_the_librarys_model(decoder):
    """segmentation_models_pytorch's model with these weights returns the same logits at a quarter of the size."""
    segmenter = small_segmenter(decoder, backbone_options=None).eval()
    kind = {"fpn": smp.FPN, "upernet": smp.UPerNet, "segformer": smp.Segformer}[decoder]
    options = {f"decoder_{name.removeprefix('decoder_')}": value for name, value in NARROW[decoder].items()}
    model = kind("tu-shunted_t", encoder_weights=None, classes=4, upsampling=1, **options).eval()
    model.decoder.load_state_dict(segmenter.decoder.state_dict())
    model.segmentation_head[0].load_state_dict(segmenter.head.state_dict())
    model.encoder.model.load_state_dict(segmenter.features.backbone.state_dict())
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        quarter = model.segmentation_head(model.decoder(model.encoder((images - segmenter.mean) / segmenter.std)))
        expected = F.interpolate(quarter, scale_factor=4, mode="bilinear", align_corners=False)
        torch.testing.assert_close(segmenter(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_gradients_reach_every_parameter(decoder):
    segmenter = small_segmenter(decoder, auxiliary=True).train()
    logits, auxiliary = segmenter.logits(torch.rand(2, 3, 64, 96))
    assert auxiliary.shape == (2, 4, 4, 6)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert not [name for name, p in segmenter.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    "backbone",
    ["resnet18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin_tiny_patch4_window7_224", "pvt_v2_b0"))],
)
def test_a_neck_may_sit_on_any_level_of_any_backbone(backbone):
    options = {"strict_img_size": False} if backbone.startswith("swin") else None
    for level in (3, 5):
        features = FeaturePath(backbone, levels=LEVELS, neck=SMALL_NECK, neck_levels=(level,), backbone_options=options)
        segmenter = Segmenter("fpn", features, 3, **NARROW["fpn"]).eval()
        images = torch.rand(1, 3, 64, 64)
        before = segmenter(images)
        with torch.no_grad():
            segmenter.features.necks[str(level)].norm.weight.zero_()
        assert not torch.allclose(before, segmenter(images)), "the neck is in the path"


@pytest.mark.slow
@pytest.mark.parametrize("decoder", sorted(DECODERS))
def test_torch_export_keeps_sizes_free(decoder):
    segmenter = small_segmenter(decoder).eval()
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(segmenter, (torch.rand(1, 3, 70, 90),), dynamic_shapes=({2: dynamic, 3: dynamic},))
    images = torch.rand(1, 3, 45, 130)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), segmenter(images), rtol=1e-4, atol=1e-5)


# --- whole image and windows


def test_windows_cover_every_pixel():
    for length, window, stride in ((10, 4, 3), (10, 4, 4), (3, 4, 2), (8, 4, 4), (1, 1, 1)):
        covered = np.zeros(length, int)
        for start in window_starts(length, window, stride):
            covered[start : start + window] += 1
            assert start + window <= max(length, window)
        assert (covered > 0).all()
    assert list(window_starts(10, 4, 3)) == [0, 3, 6]
    assert list(window_starts(8, 4, 4)) == [0, 4]


def test_overlapping_windows_are_averaged():
    """Compare with a plain loop over pixels, for a segmenter that returns the mean of its window."""

    def window_mean(x):
        return x.mean(dim=(2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])

    x = torch.rand(1, 3, 9, 7)
    out = segment_windows(window_mean, x, 4, 3)
    tops, lefts = (0, 3, 5), (0, 3)
    expected = torch.zeros(3, 9, 7)
    for i in range(9):
        for j in range(7):
            means = [x[0, :, t : t + 4, le : le + 4].mean((1, 2))
                    for t in tops for le in lefts if t <= i < t + 4 and le <= j < le + 4]  # fmt: skip
            expected[:, i, j] = torch.stack(means).mean(0)
    torch.testing.assert_close(out[0], expected)


def test_windows_and_scaling_return_the_size_of_the_image():
    segmenter = small_segmenter("fpn").eval()
    image = torch.rand(3, 50, 83)
    with torch.no_grad():
        whole = segment(segmenter, image)
        torch.testing.assert_close(whole, segmenter(image[None])[0])
        for options in ({"short_side": 32}, {"short_side": 100}, {"window": 32}, {"window": 40, "stride": 40}):
            assert segment(segmenter, image, **options).shape == whole.shape
        torch.testing.assert_close(segment(segmenter, image, window=96), whole)
    sizes = []
    segment(lambda x: sizes.append(x.shape[-2:]) or x, torch.rand(3, 30, 300), short_side=60)
    assert sizes == [(24, 240)], "the longer side is at most four times as long"


# --- the task


def small_task(**keywords):
    torch.manual_seed(0)
    defaults = {"num_classes": 4, "decoder_options": NARROW["fpn"], "backbone_options": SMALL_BACKBONE}
    return SegmentationTask(**{**defaults, **keywords})


@pytest.mark.parametrize("options", [{}, pytest.param({"window": 48}, marks=pytest.mark.slow), {"short_side": 48}])
def test_predictions_do_not_depend_on_the_batch(options):
    model = small_task(**options).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 128), torch.rand(3, 96, 64)]
    with torch.no_grad():
        alone = [model([image])[0] for image in images]
        torch.testing.assert_close(model(images), alone, rtol=0, atol=1e-4)
    assert [logits.shape for logits in alone] == [(4, *image.shape[1:]) for image in images]


class FixedSegmentationTask(SegmentationTask):
    """A task with fixed predictions that records what it logs."""

    def __init__(self, predictions, **keywords):
        super().__init__(4, backbone="test_resnet", decoder_options=NARROW["fpn"], **keywords)
        self.predictions, self.logged = predictions, {}

    def forward(self, images):
        return [F.one_hot(prediction, 4).permute(2, 0, 1).float() for prediction in self.predictions]

    def log(self, name, value, **_):
        self.logged[name] = float(value)


def test_scores_equal_a_plain_count(tmp_path, caplog):
    generator = torch.Generator().manual_seed(0)
    truths = [torch.randint(0, 3, (20, 30), generator=generator) for _ in range(3)]  # no pixel of class 3
    predictions = [torch.where(torch.rand(20, 30, generator=generator) < 0.7, truth, 0) for truth in truths]
    for truth in truths:
        truth[:5] = 255
    model = FixedSegmentationTask(predictions, class_names=["a", "b", "c", "d"])
    model.trainer = type("T", (), {
        "sanity_checking": False, "log_dir": str(tmp_path), "loggers": [1], "is_global_zero": True,
        "fast_dev_run": False,
    })()  # fmt: skip
    model.validation_step(([None] * 3, [truth.byte() for truth in truths]), 0)
    model.on_validation_epoch_end()
    assert "1 of 4 classes (d) have no pixel in these masks, where 255 means no class" in caplog.text
    truth, prediction = torch.stack(truths), torch.stack(predictions)
    known = truth != 255
    iou = [
        float(((truth == c) & (prediction == c))[known].sum() / ((truth == c) | (prediction == c))[known].sum())
        for c in range(3)
    ]
    assert model.logged["val/miou"] == pytest.approx(sum(iou) / 3)
    assert model.logged["val/pixel_acc"] == pytest.approx(float((truth == prediction)[known].float().mean()))
    with (tmp_path / "class_iou.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["a", "b", "c", "d"]
    assert [float(row["iou"]) for row in rows[:3]] == pytest.approx(iou, abs=1e-4)
    assert rows[3]["iou"] == "nan"
    assert sum(int(row["pixels"]) for row in rows) == int(known.sum())


def test_masks_without_a_class_are_refused():
    model = FixedSegmentationTask([torch.zeros(4, 5, dtype=torch.int64)])
    model.trainer = type("T", (), {"sanity_checking": False})()
    model.validation_step(([None], [torch.full((4, 5), 255, dtype=torch.uint8)]), 0)
    with pytest.raises(ValueError, match="Masks must have a class on at least one pixel, but all pixels are 255"):
        model.on_validation_epoch_end()


def test_ignored_pixels_give_no_loss():
    model = small_task()
    model.log = lambda *_, **__: None
    image = torch.rand(3, 32, 32)
    label_map = torch.randint(0, 4, (32, 32), dtype=torch.uint8)
    ignored = torch.full((32, 32), 255, dtype=torch.uint8)
    loss = model.training_step(([image, image], [ignored, ignored]), 0)
    loss.backward()
    assert loss.item() == 0
    model.eval()  # no dropout, no BatchNorm over the batch
    half = label_map.clone()
    half[16:] = 255
    other = torch.where(half == 255, half, label_map)
    both = [model.training_step(([image], [m]), 0).item() for m in (half, other)]
    assert both[0] == both[1]
    logits = model([image])[0]
    expected = F.cross_entropy(logits[:, :16].flatten(1).T, label_map[:16].flatten().long())
    assert both[0] == pytest.approx(expected.item(), rel=1e-5)


def test_head_lr_scales_the_rate_of_decoder_and_head():
    model = small_task(head_lr=10.0)
    groups = model.parameter_groups()
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert scale[id(p)] == (1 if name.startswith("segmenter.features.") else 10), name
        assert decay[id(p)] == (0 if p.ndim <= 1 else 0.05), name


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"decoder": "unet"}, "`decoder` must be one of fpn, segformer, upernet, got 'unet'"),
        ({"decoder_options": {"channels": 3}}, "fpn has no option channels; choose from .*pyramid_channels"),
        ({"num_classes": 1}, "`num_classes` must be at least 2, got 1"),
        ({"neck": SMALL_NECK, "neck_levels": [6]}, r"`neck_levels` must be among `levels` \[2, 3, 4, 5\], got level 6"),
        ({"window": 0}, "`window` must be at least 1, got 0"),
        ({"short_side": 0}, "`short_side` must be at least 1, got 0"),
        ({"window": 32, "window_stride": 64}, r"`window_stride` must be at most `window` \(32\), got 64"),
        ({"window_stride": 64}, r"`window_stride` must be at most `window` \(None\), got 64"),
        ({"head_lr": 0}, "`head_lr` must be above 0, got 0"),
        ({"auxiliary_weight": -1}, "`auxiliary_weight` must be at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        small_task(**keywords)


def test_batches_that_cannot_train_are_refused():
    model = small_task()
    maps = [torch.zeros(32, 32).byte(), torch.zeros(32, 64).byte()]
    with pytest.raises(ValueError, match=r"one size, got \[\(32, 32\), \(32, 64\)\]; set .*`crop_size`"):
        model.training_step(([torch.rand(3, 32, 32), torch.rand(3, 32, 64)], maps), 0)
    model = small_task(decoder="upernet", decoder_options=NARROW["upernet"])
    with pytest.raises(ValueError, match="upernet needs at least 2 images in a training batch, got 1"):
        model.training_step(([torch.rand(3, 32, 32)], maps[:1]), 0)


@pytest.mark.parametrize("kind", [Segmenter, *SegmentationTask.__mro__[:3], DetectionTask, ClassificationTask])
def test_docstrings_name_every_argument(kind):
    for name, parameter in inspect.signature(kind).parameters.items():
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        assert f"        {stars}{name}: " in kind.__doc__, f"{kind.__name__} does not document {name}"


@pytest.mark.slow
def test_validation_writes_its_own_table_of_classes_though_training_was_better():
    fit("--trainer.max_epochs=1", "--model=SegmentationTask", "--model.backbone=test_resnet",
          "--model.decoder=fpn", "--data=ShapesDataModule", "--data.size=64", "--data.train_size=4",
        "--data.val_size=4", "--data.batch_size=4", "--data.num_workers=0")  # fmt: skip
    last = "runs/version_0/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "best_miou": 0.99}, last)
    main(["validate", *QUIET, f"--ckpt_path={last}"])
    assert Path("runs/version_1/class_iou.csv").is_file()
