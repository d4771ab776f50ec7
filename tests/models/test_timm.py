"""The backbones as timm models: timm's own tests, and libraries that take the name of a timm model."""

import importlib.metadata
import logging
import os
import subprocess
import sys
import tarfile

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
from helpers.golden_cases import CASES, OUTPUTS, draw, reference_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import save_for_hf
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

from shunted_lit import ShuntedBackbone, ShuntedTransformer

PLUGIN = """
import shunted_lit  # registers the models, before timm's tests are collected
from timm.models import _registry

# Some of timm's tests select model families by name: run ours as members of the PVT v2 family, which takes them all.
_registry._module_to_models["pvt_v2"].update(_registry._module_to_models["timm_registry"])
"""


@pytest.fixture(scope="session")
def timm_sources(tmp_path_factory):
    """timm's source distribution, which has its tests: the file TIMM_SDIST, fetched before the tests run."""
    version, sdist = importlib.metadata.version("timm"), os.environ.get("TIMM_SDIST")
    if not sdist:
        pytest.skip(f"needs TIMM_SDIST: pip download --no-deps --no-binary :all: timm=={version}")
    folder = tmp_path_factory.mktemp("timm")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (folder / "ours.py").write_text(PLUGIN)
    return folder / f"timm-{version}"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["shunted_t", "shunted_s", "shunted_b"])
def test_timms_own_tests_pass(timm_sources, variant):
    path = os.pathsep.join([str(timm_sources.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "tests/test_models.py", "-k", variant, "-p", "ours", "-q"]
    done = subprocess.run(
        command, cwd=timm_sources, capture_output=True, text=True, timeout=1200, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "11 passed" in done.stdout.splitlines()[-1]
    assert "skipped" not in done.stdout.splitlines()[-1]


def test_import_is_light_and_registers_once_timm_is_imported():
    """A fresh process: the package alone imports neither torch nor timm; with timm, its models are known."""
    code = """
import sys
import shunted_lit
assert not {"torch", "timm", "lightning"} & sys.modules.keys()
import timm
assert set(timm.list_models("shunted_*")) == {"shunted_t", "shunted_s", "shunted_b"}
assert timm.create_model("shunted_t", features_only=True).feature_info.reduction() == [4, 8, 16, 32]
assert isinstance(shunted_lit.ShuntedTransformer(cin=8, depth=1), shunted_lit.ShuntedTransformer)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- every way to load the reference implementation's weights


@pytest.fixture(scope="module")
def reference_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ckpt_T.pth"
    torch.save({"model": reference_weights(CASES["shunted_t"]), "epoch": 299}, path)
    return str(path)


def assert_equals_reference(model):
    case = CASES["shunted_t"]
    with torch.no_grad():
        maps = model.eval().forward_features(draw(case["salt"] + 1, case["input_shape"]))
        found = model.forward_head(maps).flatten()[:: case["sample_stride"]]
    torch.testing.assert_close(found, OUTPUTS["shunted_t/output"], rtol=0, atol=2e-5)


def assert_same_body(model, reference_file):
    """Compare all weights but the head's with those of the file."""
    expected = timm.create_model("shunted_t", checkpoint_path=reference_file).state_dict()
    for name, value in model.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, expected[name]), name


def test_reference_weights_by_load_state_dict(reference_file):
    model = timm.create_model("shunted_t")
    model.load_state_dict(torch.load(reference_file, weights_only=True))
    assert_equals_reference(model)


def test_reference_weights_by_checkpoint_path(reference_file):
    assert_equals_reference(timm.create_model("shunted_t", checkpoint_path=reference_file))


def test_reference_weights_by_pretrained(reference_file):
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": reference_file}}
    assert_equals_reference(timm.create_model("shunted_t", **options))


def test_reference_weights_with_other_classes(reference_file, caplog):
    with caplog.at_level(logging.INFO):
        model = timm.create_model(
            "shunted_t", pretrained=True, pretrained_cfg_overlay={"file": reference_file}, num_classes=7
        )
    assert "head not loaded: the weights have 1000 classes, the model 7" in caplog.text
    assert model.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    assert_same_body(model, reference_file)


def test_reference_weights_with_features_only(reference_file):
    model = timm.create_model(
        "shunted_t", pretrained=True, pretrained_cfg_overlay={"file": reference_file}, features_only=True
    )
    case = CASES["shunted_t"]
    image = draw(case["salt"] + 1, case["input_shape"])
    full = timm.create_model("shunted_t", checkpoint_path=reference_file).eval()
    for found, expected in zip(model.eval()(image), full.forward_intermediates(image)[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_reference_weights_with_one_channel(reference_file):
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": reference_file}}
    grey, colour = (timm.create_model("shunted_t", **options, in_chans=n).eval() for n in (1, 3))
    x = torch.randn(1, 1, 64, 64)
    torch.testing.assert_close(grey(x), colour(x.expand(1, 3, 64, 64)), rtol=1e-3, atol=1e-4)


def test_reference_weights_by_safetensors(reference_file, tmp_path):
    weights = torch.load(reference_file, weights_only=True)["model"]
    safetensors.torch.save_file(weights, tmp_path / "t.safetensors")
    assert_equals_reference(timm.create_model("shunted_t", checkpoint_path=str(tmp_path / "t.safetensors")))


def test_round_trip_as_for_the_hub(reference_file, tmp_path):
    model = timm.create_model("shunted_t", checkpoint_path=reference_file)
    save_for_hf(model, str(tmp_path / "hub"), safe_serialization=True)
    assert_equals_reference(timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True))


def truncate(weights):
    return dict(list(weights.items())[:100])


@pytest.mark.parametrize("way", ["load_state_dict", "checkpoint_path", "pretrained", "other classes"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"1(60|58) missing \(.*; \.\.\.\)\. 100 of these 100 tensors would fit shunted_t; to leave out"),
        pytest.param(
            lambda _: reference_weights(CASES["shunted_s"]),
            r"unexpected \(.*would fit shunted_s",
            marks=pytest.mark.slow,
        ),
        (lambda _: timm.create_model("resnet18").state_dict(), "not those of a Shunted Transformer"),
        (lambda _: reference_weights(CASES["neck_small_sr2"]), "not those of a Shunted Transformer"),
    ],
    ids=["truncated", "of another variant", "of another model", "of a neck"],
)
def test_weights_that_do_not_fit_are_refused(way, change, message, tmp_path):
    weights = change(reference_weights(CASES["shunted_t"]))
    path = str(tmp_path / "weights.pth")
    torch.save(weights, path)
    ways = {
        "load_state_dict": lambda: timm.create_model("shunted_t").load_state_dict(weights),
        "checkpoint_path": lambda: timm.create_model("shunted_t", checkpoint_path=path),
        "pretrained": lambda: timm.create_model("shunted_t", pretrained=True, pretrained_cfg_overlay={"file": path}),
        "other classes": lambda: timm.create_model(
            "shunted_t", pretrained=True, pretrained_cfg_overlay={"file": path}, num_classes=7
        ),
    }
    with pytest.raises(ValueError, match=f"weights do not fit this ShuntedBackbone: .*{message}"):
        ways[way]()


def test_message_names_the_neck_that_weights_fit():
    weights = reference_weights(CASES["neck_small_sr8"])
    with pytest.raises(ValueError, match=r"They fit ShuntedTransformer\(cin=\d+, depth=\d+, .*ratios=\(8, 4\)\)"):
        ShuntedTransformer(cin=8, depth=1).load_state_dict(weights)
    with pytest.raises(ValueError, match="They are not those of a neck"):
        ShuntedTransformer(cin=8, depth=1).load_state_dict(reference_weights(CASES["shunted_t"]))


# --- beyond timm's own tests


def test_layer_groups_are_blocks():
    model = timm.create_model("shunted_s")
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    blocks = {name: groups[name] for name in groups if ".block." in name}
    assert len(set(blocks.values())) == 2 + 4 + 12 + 1
    order = [blocks[f"stages.{i}.block.{j}.norm1.weight"] for i, n in enumerate((2, 4, 12, 1)) for j in range(n)]
    assert order == sorted(order)
    assert groups["head.fc.weight"] > max(order)
    assert groups["stages.0.patch_embed.conv.0.weight"] < min(order)
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len({coarse[name] for name in blocks}) == 4


TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "num_classes": 3}


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 97), st.integers(1, 131), st.integers(0, 3), st.sampled_from(["avg", "max", "avgmax"]))
def test_gradients_reach_every_parameter_at_any_image_size(height, width, batch, pool):
    model = ShuntedBackbone(**TINY, global_pool=pool).eval()
    scores = model(torch.randn(batch, 3, height, width))
    assert scores.shape == (batch, 3)
    scores.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_parameter_has_an_effect():
    torch.manual_seed(0)
    model = ShuntedBackbone(**TINY)
    model(torch.randn(2, 3, 97, 131)).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    assert not without


# --- libraries that take the name of a timm model


@pytest.fixture
def tiny_t():
    torch.manual_seed(0)
    return timm.create_model("shunted_t", num_classes=5).eval()


SLOW_DECODERS = ("UPerNet", "Segformer", "DeepLabV3", "PAN", "DPT", "Unet")


@pytest.mark.parametrize(
    "decoder", ["FPN", "DeepLabV3Plus", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_DECODERS)]
)
def test_segmentation_models_pytorch(decoder):
    model = getattr(smp, decoder)(encoder_name="tu-shunted_t", encoder_weights=None, classes=4)
    size = (128, 160) if decoder == "PAN" else (64, 96)  # PAN pools its coarsest map three times
    out = model(torch.randn(2, 3, *size))
    assert out.shape == (2, 4, *size)
    out.square().mean().backward()
    unused = ("model.head", "model.stages_3") if decoder == "PAN" else ("model.head",)
    assert all(p.grad is not None for n, p in model.encoder.named_parameters() if not n.startswith(unused))


@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride_keeps_the_last_maps_large_and_the_weights(output_stride, tiny_t):
    maps = timm.create_model("shunted_t", features_only=True, output_stride=output_stride)
    reductions = [min(stride, output_stride) for stride in (4, 8, 16, 32)]
    assert maps.feature_info.reduction() == reductions
    out = maps(torch.randn(1, 3, 65, 97))
    assert [tuple(y.shape[2:]) for y in out] == [(-(-65 // stride), -(-97 // stride)) for stride in reductions]
    model = timm.create_model("shunted_t", num_classes=5, output_stride=output_stride).eval()
    model.load_state_dict(tiny_t.state_dict())
    x = torch.randn(1, 3, 64, 64)
    stem_to_first = reductions.index(output_stride) + 1  # these stages are as without `output_stride`
    with torch.no_grad():
        torch.testing.assert_close(model.stages[:stem_to_first](x), tiny_t.stages[:stem_to_first](x))
        # The next patch embedding samples more densely: every second row and column is that of the other model.
        x = tiny_t.stages[:stem_to_first](x)
        dense, dense_size = model.stages[stem_to_first].patch_embed(x)
        sparse, sparse_size = tiny_t.stages[stem_to_first].patch_embed(x)
        assert dense_size == (x.shape[2], x.shape[3])
        every_second = dense.unflatten(1, dense_size)[:, ::2, ::2]
        torch.testing.assert_close(every_second, sparse.unflatten(1, sparse_size))


@pytest.mark.parametrize(
    ("keywords", "given"), [({"output_stride": 4}, 4), ({"output_stride": 8, "stem": "patch16"}, 8)]
)
def test_an_output_stride_that_the_stem_exceeds_or_timm_has_not_is_refused(keywords, given):
    with pytest.raises(
        ValueError, match=f"`output_stride` must be 8, 16 or 32, and at least the stem's .*, got {given}"
    ):
        timm.create_model("shunted_t", **keywords)


def test_torchvision_pyramid_and_retinanet():
    maps = timm.create_model("shunted_t", features_only=True)
    body = BackboneWithFPN(maps, {f"stages_{i}": str(i) for i in range(4)}, maps.feature_info.channels(), 64)
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    model = RetinaNet(body, num_classes=3, min_size=96, max_size=96, anchor_generator=anchors)
    target = {"boxes": torch.tensor([[10.0, 10, 60, 60]]), "labels": torch.tensor([1])}
    losses = model([torch.rand(3, 96, 96)], [target])
    sum(losses.values()).backward()
    assert maps.stages_0.patch_embed.conv[0].weight.grad.any()
    assert set(model.eval()([torch.rand(3, 80, 96)])[0]) == {"boxes", "scores", "labels"}


def test_transformers_backbone_and_upernet():
    from transformers import AutoBackbone, TimmBackboneConfig, UperNetConfig, UperNetForSemanticSegmentation

    config = TimmBackboneConfig(backbone="shunted_t", out_indices=[0, 1, 2, 3])
    maps = AutoBackbone.from_config(config)(torch.randn(1, 3, 64, 96)).feature_maps
    assert [tuple(x.shape[1:]) for x in maps] == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]
    upernet = UperNetConfig(backbone_config=config, num_labels=4, auxiliary_in_channels=256, hidden_size=64)
    model = UperNetForSemanticSegmentation(upernet)
    labels = torch.randint(0, 4, (2, 64, 96))
    out = model(torch.randn(2, 3, 64, 96), labels=labels)
    assert out.logits.shape == (2, 4, 64, 96)
    out.loss.backward()


def test_fx_feature_extractor(tiny_t):
    extractor = create_feature_extractor(tiny_t, {"stages.1": "c3", "stages.2.block.0.attn": "tokens"})
    x = torch.randn(1, 3, 70, 90)
    found = extractor(x)
    torch.testing.assert_close(found["c3"], tiny_t.forward_intermediates(x)[1][1])
    assert found["tokens"].shape == (1, 5 * 6, 256)
    assert extractor(torch.randn(2, 3, 33, 1))["c3"].shape == (2, 128, 5, 1)


def test_scripted_backbone_gives_the_same_output(tiny_t):
    scripted = torch.jit.script(tiny_t)
    for size in [(64, 64), (1, 1), (33, 70)]:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(scripted(x), tiny_t(x))


@pytest.mark.slow
def test_backbone_compiles_as_one_graph(tiny_t):
    x = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(torch.compile(tiny_t, fullgraph=True)(x), tiny_t(x), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_backbone_exports_with_dynamic_sizes(tiny_t):
    # torch.export treats sizes of 1 as constants, so the last stage's map must be larger.
    dynamic = {
        0: torch.export.Dim("batch", min=2, max=64),
        2: torch.export.Dim("height", min=33, max=1024),
        3: torch.export.Dim("width", min=33, max=1024),
    }
    program = torch.export.export(tiny_t, (torch.randn(2, 3, 97, 131),), dynamic_shapes=(dynamic,)).module()
    for shape in [(2, 3, 33, 40), (3, 3, 64, 224), (2, 3, 131, 97)]:
        x = torch.randn(*shape)
        torch.testing.assert_close(program(x), tiny_t(x), rtol=1e-3, atol=1e-4)
