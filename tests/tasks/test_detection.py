"""Detectors over the feature path: labels, masks, independence of the batch, logged scores, weights and memory."""

import copy

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import MultiScaleRoIAlign

import shunted_lit
from shunted_lit.models.detectors import DETECTORS, GroupNorm, build_detector, detect
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.tasks import DetectionTask
from shunted_lit.utils.slices import Slices

SMALL_NECK = {"depth": 1, "mlp_ratios": 1}
SMALL_BACKBONE = {"depths": (1, 1, 1, 1), "stem": "patch4"}  # of shunted_t
BASES = {"faster_rcnn": FasterRCNN, "fcos": FCOS, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet}
FEW_PROPOSALS = {  # heads then take little time
    "rpn_post_nms_top_n_train": 64,
    "rpn_post_nms_top_n_test": 32,
    "box_batch_size_per_image": 64,
    "box_detections_per_img": 20,
}


def small_detector(name, **keywords):
    torch.manual_seed(0)
    keywords = {**(FEW_PROPOSALS if name.endswith("rcnn") else {}), **keywords}
    features = FeaturePath("shunted_t", levels=(3, 4, 5), neck=SMALL_NECK, backbone_options=SMALL_BACKBONE)
    return build_detector(name, features, 3, **{"pyramid_channels": 64, "min_size": 64, "max_size": 256, **keywords})


def no_threshold(name):
    """Return the option of a detector that keeps predictions of any score."""
    return {"box_score_thresh" if name.endswith("rcnn") else "score_thresh": 0.0}


def make_sample(height=64, width=96):
    boxes = torch.tensor([[4.0, 6, 40, 50], [30, 30, 60, 60]])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return torch.rand(3, height, width), {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}


def test_each_detector_has_its_torchvision_class():
    assert {name: entry.base for name, entry in DETECTORS.items()} == BASES


@pytest.mark.parametrize(("name", "extra"), [("faster_rcnn", 1), ("mask_rcnn", 0), ("mask_rcnn", 2)])
def test_rcnns_train_every_parameter_and_predict(name, extra):
    detector = small_detector(name, extra_levels=extra, box_score_thresh=0.0)
    assert isinstance(detector, BASES[name])
    (image, target), other = make_sample(), torch.rand(3, 70, 64)
    empty = {"boxes": torch.empty(0, 4), "labels": torch.empty(0).long(), "masks": torch.empty(0, 70, 64)}
    losses = detector.train()([image, other], [target, empty])
    sum(losses.values()).backward()
    assert ("loss_mask" in losses) == (name == "mask_rcnn")
    unused_extra = {f"backbone.fpn.extra_blocks.{p}.{w}" for p in ("p6", "p7") for w in ("weight", "bias")}
    missing = {n for n, p in detector.named_parameters() if p.grad is None}
    assert missing <= unused_extra, "levels that no anchor of this image is on"
    for result, shape in zip(detect(detector.eval(), [image, other]), [(64, 96), (70, 64)], strict=True):
        assert len(result["boxes"])
        assert set(result["labels"].tolist()) <= {0, 1, 2}
        if name == "mask_rcnn":
            assert result["masks"].shape == (len(result["boxes"]), *shape)
            assert result["masks"].dtype == torch.bool


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("fcos", 32),
        pytest.param("retinanet", 1, marks=pytest.mark.slow),
        pytest.param("faster_rcnn", 2, marks=pytest.mark.slow),
        pytest.param("mask_rcnn", 2, marks=pytest.mark.slow),
    ],
)
def test_narrow_pyramids_train_and_predict_on_maps_of_one_place(name, channels):
    detector = small_detector(name, pyramid_channels=channels, min_size=16, max_size=16, **no_threshold(name))
    (image, target), other = make_sample(16, 16), torch.rand(3, 16, 16)
    target["boxes"] = torch.tensor([[0.0, 0, 12, 12], [4, 4, 16, 16]])
    sum(detector.train()([image], [target]).values()).backward()
    (alone,), (batched, _) = detect(detector.eval(), [image]), detect(detector, [image, other])
    assert len(alone["boxes"])
    torch.testing.assert_close(alone, batched, rtol=1e-4, atol=1e-4)


def test_group_norm_equals_that_of_torch_and_takes_one_value_per_group():
    own, torchs = GroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(torchs.weight)
    torch.nn.init.normal_(torchs.bias)
    own.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 8, 3, 1)
    torch.testing.assert_close(own(x), torchs(x), rtol=0, atol=0)
    own.num_groups = torchs.num_groups = 8
    torch.testing.assert_close(own(x[:1, :, :1]), torchs(x[:, :, :1])[:1], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_labels_are_those_of_torchvision_minus_one(name):
    detector = small_detector(name, box_score_thresh=0.0)
    image, target = make_sample()
    torch.manual_seed(1)
    losses = detector.train()([image], [target])
    torch.manual_seed(1)
    expected = GeneralizedRCNN.forward(detector, [image], [{**target, "labels": target["labels"] + 1}])
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)
    detector.eval()
    (result,), (expected,) = detector([image]), GeneralizedRCNN.forward(detector, [image])
    assert torch.equal(result["labels"] + 1, expected["labels"])
    if name == "mask_rcnn":
        assert torch.equal(result["masks"], expected["masks"][:, 0] >= 0.5)
    assert target["labels"].tolist() == [0, 2], "targets are not modified"


@pytest.mark.parametrize("name", ["faster_rcnn", "mask_rcnn"])
def test_heads_over_256_channels_are_as_published(name):
    features = FeaturePath("resnet18", levels=(2, 3, 4, 5))
    detector = build_detector(name, features, 7, extra_levels=1)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    pool = MultiScaleRoIAlign(["2", "3", "4", "5"], 7, 2)
    published = BASES[name](copy.deepcopy(detector.backbone), 8, rpn_anchor_generator=anchors, box_roi_pool=pool)
    shapes = ({key: value.shape for key, value in model.state_dict().items()} for model in (detector, published))
    assert next(shapes) == next(shapes)
    assert detector.rpn.anchor_generator.sizes == anchors.sizes
    assert detector.roi_heads.box_roi_pool.canonical_scale == pool.canonical_scale


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_predictions_do_not_depend_on_the_batch(name):
    detector = small_detector(name, **no_threshold(name)).eval()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 128), torch.rand(3, 128, 64)]
    with torch.no_grad():
        alone = [detect(detector, [image])[0] for image in images]
        together = detect(detector, images)
        maps = [detector.backbone(detector.transform(some)[0].tensors)["3"][0] for some in (images[:1], images)]
    for single, batched in zip(alone, together, strict=True):
        assert len(single["boxes"])
        torch.testing.assert_close(single, batched, rtol=0, atol=1e-4)
    leak = (maps[1][:, :8, :8] - maps[0]).norm() / maps[0].norm()
    assert leak > 1e-3, "padding to the largest image would change the maps"


def test_images_of_one_size_share_a_batch():
    detector = small_detector("retinanet").eval()
    images = [torch.rand(3, 64, 96) for _ in range(3)]
    with torch.no_grad():
        maps = detector.backbone(detector.transform(images)[0].tensors)
        for i, image in enumerate(images):
            alone = detector.backbone(detector.transform([image])[0].tensors)
            for level, x in alone.items():
                torch.testing.assert_close(maps[level][i : i + 1], x, rtol=0, atol=1e-4)
    sizes = []
    detector.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    with torch.no_grad():
        detect(detector, [images[0], torch.rand(3, 32, 32), *images[1:]])
    assert sizes == [3, 1]


@pytest.mark.parametrize(
    "name",
    ["fcos", "mask_rcnn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("faster_rcnn", "retinanet"))],
)
@pytest.mark.parametrize("size", [(3, 700), (700, 2), (1, 1)])
def test_boxes_lie_within_the_narrowest_images(name, size):
    detector = small_detector(name, **no_threshold(name)).eval()
    detector.transform.min_size, detector.transform.max_size = (64,), 128
    with torch.no_grad():
        (result,) = detect(detector, [torch.rand(3, *size)])
    assert (result["boxes"] >= 0).all()
    assert (result["boxes"] <= torch.tensor([size[1], size[0]] * 2)).all()
    assert len(result["boxes"]) == len(result["labels"]) == len(result["scores"])
    assert result.get("masks", torch.zeros(0, *size)).shape[-2:] == size


class FixedDetectionTask(DetectionTask):
    """A task with fixed predictions that records what it logs."""

    def __init__(self, predictions, **keywords):
        super().__init__(num_classes=3, backbone="test_resnet", pyramid_channels=16, extra_levels=0, **keywords)
        self.predictions, self.logged = predictions, {}

    def forward(self, images):
        return self.predictions

    def log(self, name, value, **_):
        self.logged[name] = float(value)


@pytest.mark.parametrize("shift", [0, 24])
def test_boxes_and_masks_are_scored_separately(shift):
    _, target = make_sample()
    target = {**target, "iscrowd": torch.zeros(2).long()}
    prediction = {**target, "scores": torch.ones(2), "masks": target["masks"].roll(shift, -1)}
    task = FixedDetectionTask([prediction], detector="mask_rcnn")
    task.validation_step(([torch.rand(3, 64, 96)], [target]), 0)
    task.on_validation_epoch_end()
    assert task.logged["val/map"] == task.logged["val/map_50"] == pytest.approx(1)
    assert task.logged["val/mask_map_50"] == pytest.approx(0 if shift else 1)
    names = {f"val/{kind}{name}" for kind in ("", "mask_") for name in DetectionTask.METRICS}
    assert set(task.logged) == names


def test_mask_rcnn_without_masks_is_refused():
    image, target = make_sample()
    del target["masks"]
    with pytest.raises(
        ValueError, match="mask_rcnn needs targets with masks, got boxes alone; give masks or use faster_rcnn"
    ):
        small_detector("mask_rcnn").train()([image], [target])


# --- the feature path: checkpointing and weights


@pytest.mark.parametrize(
    "backbone",
    ["shunted_t", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet18", "convnext_atto", "pvt_v2_b0"))],
)
def test_checkpointing_saves_memory_and_changes_no_gradient(backbone):
    grads, saved = [], []
    x = torch.rand(2, 3, 64, 64)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        path = FeaturePath(backbone, levels=(3, 4, 5), neck=SMALL_NECK, grad_checkpointing=checkpointing).train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            loss = sum(feature.square().mean() for feature in path(x).values())
        loss.backward()
        saved.append(sum(sizes))
        grads.append({name: p.grad for name, p in path.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)
    assert saved[1] < 0.7 * saved[0], "less is saved for the backward pass"


def test_a_backbone_starts_from_a_classifier(tmp_path):
    source = shunted_lit.shunted_t(num_classes=5)
    torch.save(
        {"state_dict": {f"model.{name}": value for name, value in source.state_dict().items()}}, tmp_path / "run.ckpt"
    )
    path = FeaturePath("shunted_t", levels=(2, 3, 4, 5), weights=str(tmp_path / "run.ckpt")).eval()
    source.eval()
    x = torch.rand(1, 3, 64, 64)
    expected = source.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(list(path(x).values()), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"run.ckpt: weights do not fit shunted_s: .*would fit shunted_t"):
        FeaturePath("shunted_s", weights=str(tmp_path / "run.ckpt"))
    with pytest.raises(ValueError, match="weights do not fit resnet18"):
        FeaturePath("resnet18", weights=str(tmp_path / "run.ckpt"))
    with pytest.raises(ValueError, match=r"none.pth: no such file"):
        FeaturePath("shunted_t", weights=str(tmp_path / "none.pth"))
    with pytest.raises(
        ValueError, match=r"`pretrained` must be false where `weights` is given \(.*run\.ckpt\): choose one"
    ):
        FeaturePath("shunted_t", pretrained=True, weights=str(tmp_path / "run.ckpt"))


def test_a_backbone_starts_from_a_classifier_of_timm(tmp_path):
    source = timm.create_model("resnet18", num_classes=4).eval()
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    path = FeaturePath("resnet18", weights=str(tmp_path / "resnet.pth")).eval()
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(path(x)["5"], source.forward_features(x))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"detector": "fcso"}, "`detector` must be one of faster_rcnn, .*, got 'fcso'; did you mean 'fcos'"),
        ({"detector_options": {"score": 1}}, "fcos has no option score; choose from .*score_thresh"),
        ({"extra_levels": 3}, r"`extra_levels` must be one of \[0, 1, 2\], got 3"),
        ({"pyramid_channels": 0}, "`pyramid_channels` must be at least 1, got 0"),
        ({"min_size": [32, 96], "max_size": 64}, r"between 1 and `max_size` \(64\), got \[32, 96\]; lower it or raise"),
        ({"class_names": ["a"]}, r"`class_names` must have `num_classes` \(2\) names, got 1"),
    ],
)
def test_wrong_arguments_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        DetectionTask(**{"num_classes": 2, "backbone": "test_resnet", "extra_levels": 0, **keywords})


def test_positional_settings_are_refused():
    with pytest.raises(TypeError, match="positional"):
        DetectionTask(2, None, "fcos")


@pytest.mark.parametrize(
    ("detector", "options", "slices", "counted"),
    [
        ("fcos", {}, None, 100),
        ("fcos", {"detections_per_img": 127}, None, 127),
        ("faster_rcnn", {"box_detections_per_img": 110}, None, 110),
        ("fcos", {}, Slices(8, 0.5), 150),
    ],
)
def test_scores_count_as_many_objects_of_an_image_as_the_detector_reports(detector, options, slices, counted):
    grid = torch.arange(150)
    x, y = grid % 15 * 4.0, grid // 15 * 4.0
    objects = {"boxes": torch.stack([x, y, x + 3, y + 3], 1), "labels": torch.zeros(150, dtype=torch.long)}
    network = {"backbone": "resnet10t", "neck": None, "pyramid_channels": 64, "min_size": 64, "max_size": 64}
    task = DetectionTask(1, detector=detector, detector_options=options, **network)
    # The detector finds every object, with falling scores.
    task.forward = lambda images: [{**objects, "scores": torch.linspace(1, 0.5, 150)} for _ in images]
    data = LightningDataModule()
    loader = DataLoader([(torch.rand(3, 64, 64), objects)], collate_fn=lambda rows: list(zip(*rows, strict=True)))
    data.val_dataloader = lambda: loader
    data.slicing, data.annotation = slices, "boxes"
    (scores,) = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).validate(task, data, verbose=False)
    recalls = torch.linspace(0, 1, 101)  # where COCO interpolates the precision, which is 1 up to the recall reached
    assert scores["val/map"] == pytest.approx((recalls <= counted / 150 + 1e-6).float().mean().item())
