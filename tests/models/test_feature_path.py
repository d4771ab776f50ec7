"""The feature path, and the detectors over it."""

import pytest
import timm
import torch
from torchvision.models.detection import FCOS, RetinaNet

from shunted_lit.models.detectors import DETECTORS, Pyramid, build_detector
from shunted_lit.models.feature_path import FeaturePath

SMALL = {"depth": 1, "mlp_ratios": 1}


@pytest.mark.parametrize("backbone", ["resnet18", "shunted_t", "mobilenetv3_small_050", "swin_tiny_patch4_window7_224"])
def test_levels_are_strides(backbone):
    options = {"strict_img_size": False} if backbone.startswith("swin") else None
    path = FeaturePath(backbone, levels=(5, 3, 4), neck=SMALL, neck_levels=(4, 5), backbone_options=options).eval()
    features = path(torch.randn(1, 3, 64, 96))
    assert list(features) == ["3", "4", "5"]
    for level, channels in path.channels.items():
        assert features[str(level)].shape == (1, channels, 64 // 2**level, 96 // 2**level)
    assert {level: neck.cin for level, neck in path.necks.items()} == {
        "4": path.channels[4],
        "5": path.channels[5],
    }


def test_neck_changes_only_its_level():
    torch.manual_seed(0)
    path = FeaturePath("resnet18", levels=(4, 5), neck=SMALL).eval()
    reference = timm.create_model("resnet18", features_only=True).eval()
    reference.load_state_dict(path.backbone.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    *_, c4, c5 = reference(x)
    features = path(x)
    torch.testing.assert_close(features["4"], c4)
    torch.testing.assert_close(features["5"], path.necks["5"](c5))


def test_a_new_neck_can_start_as_an_identity():
    path = FeaturePath("resnet18", levels=(4, 5), neck={**SMALL, "identity_start": True}).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(path(x)["5"], path.backbone(x)[1])


def test_unused_stages_are_not_built():
    path = FeaturePath("resnet18", levels=(3,))
    assert not any(name.startswith("layer4") for name, _ in path.backbone.named_parameters())


def test_pretrained_is_passed_to_timm(monkeypatch):
    asked = []
    create = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda name, **kw: asked.append(kw.pop("pretrained", None)) or create(name, **kw)
    )
    FeaturePath("resnet18", pretrained=True)
    assert True in asked


def test_frozen_backbone_does_not_change():
    path = FeaturePath("resnet18", neck=SMALL, freeze_backbone=True).train()
    before = {name: value.clone() for name, value in path.backbone.state_dict().items()}
    features = path(torch.randn(2, 3, 64, 64))
    features["5"].sum().backward()
    assert all(p.grad is None for p in path.backbone.parameters())
    assert all(p.grad is not None for p in path.necks.parameters())
    for name, value in path.backbone.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed"


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"backbone": "resnet19"}, r"`backbone` must be a timm model, got 'resnet19'; close names: .*resnet1"),
        ({"levels": (3, 6)}, r"resnet18 has no level 6 \(stride 64\): its maps have strides \[2, 4, 8, 16, 32\]"),
        ({"neck": SMALL, "neck_levels": (2,)}, r"`neck_levels` must be among `levels` \[3, 4, 5\], got level 2"),
        ({"neck": {"cin": 256}}, "`cin` must be 512, the channels of level 5, got 256"),
        ({"neck": {"dept": 3}}, r"the neck has no keyword \'dept\'; did you mean depth\?"),
        ({"neck": {"x": 3}}, "the neck has no keyword 'x'; it has .*cin, depth"),
        ({"neck": {"depth": "two"}}, "`depth` of the neck must be int, got 'two'"),
        ({"neck": {"ratios": [2, 1.5]}}, r"`ratios` of the neck must be Sequence\[int\] \| None, got \[2, 1.5\]"),
        ({"neck": {"qkv_bias": 1}}, "`qkv_bias` of the neck must be bool, got 1"),
        ({"neck": {"num_heads": 3}}, "`num_heads` must divide the channels, got 3 heads and 512 channels"),
    ],
)
def test_invalid_feature_paths_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        FeaturePath(**keywords)


@pytest.mark.parametrize("extra", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("name", "kind"), [("fcos", FCOS), ("retinanet", RetinaNet)])
def test_detectors_learn_and_predict(name, kind, extra):
    torch.manual_seed(0)
    features = FeaturePath("shunted_t", neck=SMALL)
    detector = build_detector(name, features, 3, pyramid_channels=32, extra_levels=extra, min_size=64, max_size=128)
    assert isinstance(detector, kind)
    assert detector.backbone.strides == [8, 16, 32, 64, 128][: 3 + extra]
    images = [torch.rand(3, 64, 96), torch.rand(3, 70, 64)]
    boxes = torch.tensor([[4.0, 6, 40, 50], [30, 30, 60, 60]])
    targets = [{"boxes": boxes, "labels": torch.tensor([0, 2])}, {"boxes": boxes[:0], "labels": torch.empty(0).long()}]
    losses = detector.train()(images, targets)
    sum(losses.values()).backward()
    missing = [n for n, p in detector.named_parameters() if p.grad is None]
    assert not missing
    predictions = detector.eval()(images)
    for image, prediction in zip(images, predictions, strict=True):
        height, width = image.shape[-2:]
        assert prediction.keys() == {"boxes", "labels", "scores"}
        assert (prediction["boxes"] >= 0).all()
        assert (prediction["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_pyramid_levels_have_their_strides():
    pyramid = Pyramid(FeaturePath("resnet18"), 16, 2).eval()
    maps = pyramid(torch.randn(1, 3, 256, 128))
    assert [256 // x.shape[2] for x in maps.values()] == pyramid.strides


def test_invalid_detectors_are_refused():
    features = FeaturePath("resnet18")
    with pytest.raises(ValueError, match=f"`detector` must be one of {', '.join(sorted(DETECTORS))}, got 'yolo'"):
        build_detector("yolo", features, 3)
    with pytest.raises(ValueError, match="`num_classes` must be at least 1, got 0"):
        build_detector("fcos", features, 0)
    with pytest.raises(ValueError, match=r"`extra_levels` must be one of \[0, 1, 2\], got 3"):
        build_detector("fcos", features, 1, extra_levels=3)
