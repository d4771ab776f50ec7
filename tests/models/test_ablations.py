"""Ablation variants by name, against plain formulas; the default network is the paper's."""

import itertools
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.golden_cases import CASES, OUTPUTS, build, draw, reference_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from shunted_lit import ShuntedBackbone, ShuntedTransformer
from shunted_lit.cli import main
from shunted_lit.commands.export import export
from shunted_lit.models import ablations
from shunted_lit.models.ablations import AGGREGATIONS, FEED_FORWARDS, LOCAL_ENHANCEMENTS, STEMS
from shunted_lit.visualization.attention import attention_maps

VARIANTS = {"aggregation": AGGREGATIONS, "local_enhancement": LOCAL_ENHANCEMENTS, "feed_forward": FEED_FORWARDS}
COMBINATIONS = [dict(zip(VARIANTS, names, strict=True)) for names in itertools.product(*VARIANTS.values())]
SMALL = {"cin": 16, "depth": 1, "num_heads": 4, "mlp_ratios": 2}
ROOT = Path(__file__).parents[2]


@given(variants=st.sampled_from(COMBINATIONS), height=st.integers(1, 9), width=st.integers(1, 9),
       ratios=st.sampled_from([(2, 1), (4, 2), (1,), (8, 4, 2, 1)]))  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_every_combination_trains_at_any_size(variants, height, width, ratios):
    torch.manual_seed(0)
    neck = ShuntedTransformer(**SMALL, **variants, ratios=ratios)
    x = torch.randn(2, 16, height, width)
    out = neck(x)
    assert out.shape == x.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    with torch.inference_mode():
        torch.testing.assert_close(neck.eval()(x), out.detach(), rtol=1e-4, atol=1e-5)
    maps = attention_maps(neck, x, (0, 0))
    assert [found.ratio for found in maps] == list(ratios)


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_aggregations_equal_their_formulas(ratio):
    x = torch.randn(2, 5, 4 * ratio, 2 * ratio)
    patches = F.unfold(x, ratio, stride=ratio).unflatten(1, (5, ratio**2)).unflatten(3, (4, 2))
    torch.testing.assert_close(AGGREGATIONS["avg"](5, ratio)(x), patches.mean(2))
    torch.testing.assert_close(AGGREGATIONS["max"](5, ratio)(x), patches.amax(2))
    linear = AGGREGATIONS["linear"](5, ratio)
    expected = torch.einsum("bcphw,p->bchw", patches, linear.linear.weight[0]) + linear.linear.bias
    torch.testing.assert_close(linear(x), expected)
    conv = AGGREGATIONS["conv"](5, ratio)
    expected = torch.einsum("bcphw,dcp->bdhw", patches, conv.weight.flatten(2)) + conv.bias[:, None, None]
    torch.testing.assert_close(conv(x), expected)


def test_local_enhancement_equals_its_formulas():
    torch.manual_seed(0)
    x, size = torch.randn(2, 30, 16), (5, 6)
    necks = {name: ShuntedTransformer(**SMALL, local_enhancement=name).eval() for name in LOCAL_ENHANCEMENTS}
    heads = {name: neck.block[0].attn.groups[0] for name, neck in necks.items()}
    for some in heads.values():
        shared = {k: v for k, v in heads["before"].state_dict().items() if "local_conv" not in k}
        some.load_state_dict(shared, strict=False)
    q = torch.randn(2, 30, 8)
    merged = heads["none"].aggregate(x, size)
    k, v = heads["none"].keys_and_values(merged.flatten(2).transpose(1, 2), merged.shape[2:])
    bare = heads["none"].attend(q, k, v)
    torch.testing.assert_close(heads["none"](q, x, size), bare)
    image = bare.transpose(1, 2).unflatten(2, size)
    local = heads["after"].local_conv
    detail = F.conv2d(image, local.weight, local.bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(heads["after"](q, x, size), bare + detail)
    assert not any("local_conv" in name for name in necks["none"].state_dict())
    zeroed = necks["before"]
    for name, parameter in zeroed.named_parameters():
        if "local_conv" in name:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(heads["before"](q, x, size), bare)


def test_conventional_feed_forward_is_the_detailed_one_without_convolution():
    detail, plain = (FEED_FORWARDS[name](8, 16) for name in ("detail", "conventional"))
    plain.load_state_dict({k: v for k, v in detail.state_dict().items() if "dwconv" not in k})
    torch.nn.init.zeros_(detail.dwconv.weight)
    torch.nn.init.zeros_(detail.dwconv.bias)
    x = torch.randn(2, 12, 8)
    torch.testing.assert_close(plain(x, (3, 4)), detail(x, (3, 4)))


@pytest.mark.parametrize(("stem", "stride", "kernel"), [("patch4", 4, 4), ("patch16", 16, 16), ("overlap7", 4, 7)])
@pytest.mark.parametrize("size", [(64, 64), (97, 131), (1, 5)])
def test_stems_have_their_strides_at_any_size(stem, stride, kernel, size):
    options = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 3}
    model = ShuntedBackbone(**options, stem=stem)
    assert model.stages[0].patch_embed.proj.kernel_size == (kernel, kernel)
    assert [entry["reduction"] for entry in model.feature_info] == [stride, 2 * stride, 4 * stride, 8 * stride]
    x = torch.rand(1, 3, *size)
    for stage, entry in zip(model.stages, model.feature_info, strict=True):
        x = stage(x)
        assert x.shape[2:] == tuple(-(-side // entry["reduction"]) for side in size)
    assert model(torch.rand(1, 3, *size)).shape == (1, 3)


def test_timm_builds_variants_by_name():
    names = {"stem": "overlap7", "aggregation": "avg", "local_enhancement": "none", "feed_forward": "conventional"}
    model = timm.create_model("shunted_t", features_only=True, **names)
    assert [maps.shape[1:] for maps in model(torch.rand(1, 3, 64, 64))] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2),
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) < 11e6


def test_default_neck_equals_the_reference_and_uses_no_variant():
    neck = build(CASES["neck_small_sr2"])
    neck.load_state_dict(reference_weights(CASES["neck_small_sr2"]))
    out = neck(draw(CASES["neck_small_sr2"]["salt"] + 1, CASES["neck_small_sr2"]["input_shape"]))
    torch.testing.assert_close(out.detach().flatten(), OUTPUTS["neck_small_sr2/output"].flatten(), rtol=0, atol=2e-5)
    kinds = {type(module).__module__ for module in neck.modules()}
    assert ablations.__name__ not in kinds


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"aggregation": "mean"}, "`aggregation` must be one of avg, conv, linear, max, got 'mean'"),
        ({"local_enhancement": "twice"}, "`local_enhancement` must be one of after, before, none, got 'twice'"),
        ({"feed_forward": "deep"}, "`feed_forward` must be one of conventional, detail, got 'deep'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(keywords, message):
    with pytest.raises(ValueError, match=message):
        ShuntedTransformer(**SMALL, **keywords)
    with pytest.raises(ValueError, match="`stem` must be one of overlap7, patch16, patch4, shunted, got 'vit'"):
        ShuntedBackbone(stem="vit")
    assert set(STEMS) == {"overlap7", "patch16", "patch4", "shunted"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs/ablations").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.slow
def test_configs_train_the_variant_in_their_name(path):
    cli = main([
        "fit", f"--config={path}", "--data.train_size=4", "--data.val_size=2", "--data.batch_size=2",
        "--data.num_workers=0", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
    ])  # fmt: skip
    options = cli.model.hparams["backbone_options"] or {}
    (keyword, name), = options.items() if options else [("paper", "")]  # fmt: skip
    assert f"{keyword}_{name}".strip("_") == path.stem
    assert options == {} or name in {**VARIANTS, "stem": STEMS}[keyword]


@pytest.mark.slow
@pytest.mark.parametrize("variants", [{}, COMBINATIONS[-1], {"aggregation": "avg"}, {"aggregation": "linear"}])
def test_variants_survive_yaml_checkpoint_and_export(variants):
    """Checkpoints and .safetensors record the variants of the network."""
    neck = {"depth": 1, "num_heads": 4, "mlp_ratios": 1, **variants}
    cli = main([
        "fit", f"--config={ROOT}/configs/neck.yaml", f"--model.neck={json.dumps(neck)}", "--model.pyramid_channels=32",
        "--data.train_size=4", "--data.val_size=2", "--data.size=64", "--data.batch_size=2", "--data.num_workers=0",
        "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--model.min_size=64",
    ])  # fmt: skip
    trained = next(iter(cli.model.detector.backbone.body.necks.values())).eval()
    checkpoint = f"{cli.trainer.log_dir}/checkpoints/last.ckpt"
    x = torch.rand(1, trained.cin, 6, 7)
    found = ShuntedTransformer.from_checkpoint(checkpoint)
    torch.testing.assert_close(found(x), trained(x))
    export(checkpoint, format="safetensors", part="neck", out=Path("neck"))
    torch.testing.assert_close(ShuntedTransformer.from_checkpoint("neck/model.safetensors")(x), trained(x))
    export(checkpoint, format="onnx", part="neck", out=Path("neck.onnx"))
