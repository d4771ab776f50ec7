"""Recorded attention and its cost against plain formulas; recording changes nothing; pictures have one scale."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shunted_lit  # noqa: F401 - registers the variants with timm
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.models.shunted import PlainHeads, ShuntedBackbone, ShuntedTransformer
from shunted_lit.visualization.attention import (
    AttentionMap,
    attention_costs,
    attention_maps,
    draw_attention,
    keep_last_blocks,
)

SMALL = {"cin": 16, "depth": 2, "num_heads": 4, "mlp_ratios": 1}


def head_groups(neck):
    return [group for block in neck.block for group in block.attn.groups]


def run_and_capture(model, x, groups):
    """Run a model, and return the output of each head group's attention and its values (B, heads, n, d)."""
    outputs, values = [], []

    def attend(heads, q, k, v):
        outputs.append(PlainHeads.attend(heads, q, k, v))
        values.append(v.unflatten(-1, (heads.num_heads, -1)).transpose(1, 2))
        return outputs[-1]

    for heads in groups:
        heads.attend = partial(attend, heads)
    with torch.no_grad():
        model(x)
    for heads in groups:
        del heads.attend
    return outputs, values


@given(
    ratios=st.lists(st.integers(1, 5), min_size=1, max_size=4).filter(lambda ratios: 4 % len(ratios) == 0),
    height=st.integers(1, 12), width=st.integers(1, 12), batch=st.integers(1, 2), data=st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=12)
def test_maps_are_the_weights_that_attention_used(ratios, height, width, batch, data):
    torch.manual_seed(0)
    neck = ShuntedTransformer(**SMALL, ratios=tuple(ratios), dtype=torch.float64).eval()
    x = torch.randn(batch, 16, height, width, dtype=torch.float64)
    column, row = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    outputs, values = run_and_capture(neck, x, head_groups(neck))
    maps = attention_maps(neck, x, (column + 0.5, row + 0.5))
    assert [attention.ratio for attention in maps] == [*ratios, *ratios]
    for attention, out, v in zip(maps, outputs, values, strict=True):
        assert attention.token == (column, row)
        assert attention.weights.shape[2:] == (-(-height // attention.ratio), -(-width // attention.ratio))
        torch.testing.assert_close(attention.weights.sum((2, 3)), torch.ones(attention.weights.shape[:2]))
        expected = torch.einsum("bhn,bhnd->bhd", attention.weights.flatten(2).double(), v).flatten(1)
        torch.testing.assert_close(expected, out[:, row * width + column], rtol=1e-5, atol=1e-6)


def test_maps_of_a_neck_across_levels_start_at_the_finest_level():
    torch.manual_seed(0)
    path = FeaturePath("resnet18", neck={"form": "pyramid"}, neck_levels=(3, 4, 5)).eval()
    x = torch.rand(1, 3, 64, 96)
    outputs, values = run_and_capture(path, x, head_groups(path.necks["pyramid"]))
    maps = attention_maps(path, x, (50, 20))
    assert [(a.ratio, a.stride, a.token, a.weights.shape) for a in maps] == [
        (4, 8, (6, 2), (1, 1, 2, 3)), (2, 16, (6, 2), (1, 1, 2, 3)), (1, 32, (6, 2), (1, 1, 2, 3)),
    ]  # fmt: skip
    for attention, out, v in zip(maps, outputs, values, strict=True):
        expected = torch.einsum("bhn,bhnd->bhd", attention.weights.flatten(2), v).flatten(1)
        torch.testing.assert_close(expected, out[:, 2 * 12 + 6], rtol=1e-5, atol=1e-5)
    draw_attention(Path("across.png"), x[0], maps, (50, 20))
    assert Path("across.png").is_file()


def test_recording_leaves_the_network_unchanged():
    neck = ShuntedTransformer(**SMALL).train()
    x, before = torch.randn(1, 16, 9, 7), {name: len(vars(module)) for name, module in neck.named_modules()}
    expected = neck(x)
    attention_maps(neck, x, (3, 4))
    assert neck.training
    assert {name: len(vars(module)) for name, module in neck.named_modules()} == before
    assert not any(module._forward_pre_hooks for module in neck.modules())
    torch.testing.assert_close(neck(x), expected, rtol=0, atol=0)


def test_point_is_the_right_token_in_each_stage():
    model = timm.create_model("shunted_t", num_classes=0)
    maps = attention_maps(model, torch.rand(1, 3, 97, 131), (130, 96))
    tokens = {attention.name.partition(".block")[0]: (attention.stride, attention.token) for attention in maps}
    assert tokens == {
        "stages.0": (4, (32, 24)), "stages.1": (8, (16, 12)), "stages.2": (16, (8, 6)), "stages.3": (32, (4, 3)),
    }  # fmt: skip
    depths = {"stages.0.block.0", "stages.1.block.1", "stages.2.block.3", "stages.3.block.0"}
    assert {attention.name.partition(".attn")[0] for attention in keep_last_blocks(maps)} == depths


def test_stages_may_have_any_number_of_granularities():
    model = ShuntedBackbone(depths=(1, 1, 1, 1), num_heads=(4, 4, 8, 16), ratios=((8, 4, 2, 1), (4, 2), 2, 1))
    maps = attention_maps(model, torch.rand(1, 3, 64, 64), (5, 5))
    assert [attention.ratio for attention in maps] == [8, 4, 2, 1, 4, 2, 2, 1, 1]


def test_wrong_networks_and_points_are_reported():
    with pytest.raises(ValueError, match="`model` must contain a neck or a shunted backbone; Conv2d does not"):
        attention_maps(torch.nn.Conv2d(3, 3, 1), torch.rand(1, 3, 4, 4), (1, 1))
    with pytest.raises(ValueError, match="`point` must be inside the 4 x 4 pixels, got 4,1"):
        attention_maps(ShuntedTransformer(**SMALL), torch.rand(1, 16, 4, 4), (4, 1))


# --- costs


def check_costs(size, ratios, aggregation="conv", local_enhancement="before"):
    """Compare the costs of a neck of 16 channels and 4 heads with formulas."""
    H, W = size
    variants = {"aggregation": aggregation, "local_enhancement": local_enhancement}
    neck = ShuntedTransformer(**SMALL, ratios=ratios, **variants)
    costs = attention_costs(neck.eval(), torch.rand(1, 16, H, W))
    assert [cost.ratio for cost in costs] == [*ratios, *ratios], "two blocks"
    for cost in costs:
        heads, r = 4 // len(ratios), cost.ratio
        queries, keys, width = H * W, -(-H // r) * -(-W // r), 4 * heads
        assert (cost.heads, cost.queries, cost.keys) == (heads, queries, keys)
        per_key = {"conv": 16 * 16 * r * r, "linear": 16 * r * r, "avg": 0}[aggregation] if ratios != (1,) else 0
        enhanced = {"before": keys, "after": queries, "none": 0}[local_enhancement]
        assert cost.flops == {
            "aggregation": 2 * keys * per_key,
            "projection": 2 * keys * 16 * 2 * width + 2 * enhanced * 9 * width,
            "attention": 2 * 2 * queries * keys * width,
        }


@pytest.mark.parametrize("ratios", [(8, 4, 2, 1), (2, 1), (1,), (3,)])
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_costs_equal_the_formulas(ratios, size):
    check_costs(size, ratios)


@pytest.mark.parametrize("aggregation", ["avg", "linear", "conv"])
@pytest.mark.parametrize("local_enhancement", ["after", "before", "none"])
def test_costs_of_ablation_variants_equal_the_formulas(aggregation, local_enhancement):
    check_costs((7, 6), (3, 1), aggregation, local_enhancement)


def test_costs_on_the_meta_device_need_no_memory():
    with torch.device("meta"):
        neck = ShuntedTransformer()
        assert [cost.keys for cost in attention_costs(neck, torch.empty(1, 512, 4096, 4096))][:2] == [2**22, 2**24]


# --- pictures


def test_picture_has_one_colour_scale():
    """Equal attention is grey at any granularity; a key with more than its share is red, the others are blue."""
    peak = torch.full((1, 2, 4, 4), 0.5 / 15)
    peak[..., 0, 0] = 0.5
    maps = [
        AttentionMap("block.0.attn.groups.0", 8, 4, (0, 0), torch.full((1, 2, 2, 2), 1 / 4)),
        AttentionMap("block.0.attn.groups.1", 4, 4, (0, 0), peak),
    ]
    torch.testing.assert_close(maps[0].over_equal(), torch.ones(1, 2, 2))
    torch.testing.assert_close(maps[1].over_equal()[0, 0, :2], torch.tensor([8, 8 / 15]))
    draw_attention(Path("a.png"), torch.full((3, 64, 64), 0.5), maps, (63, 63))
    with Image.open("a.png") as file:
        picture = file.convert("RGB")
    side, middle = picture.width / 3.3, picture.height // 2  # three panels and the bar
    equal = picture.getpixel((int(1.4 * side), middle))
    assert max(equal) - min(equal) < 12
    across = [picture.getpixel((int(2 * side + i), int(0.2 * picture.height))) for i in range(int(0.9 * side))]
    assert max(red - blue for red, _, blue in across) > 60
    assert min(red - blue for red, _, blue in across) < -20


@pytest.mark.parametrize(("height", "width"), [(3000, 8), (8, 3000), (200, 1), (1, 200)])
def test_pictures_of_thin_images_have_a_visible_size(height, width):
    attention = AttentionMap("block.0.attn.groups.0", 1, 1, (0, 0), torch.full((1, 1, height, width), 1e-4))
    draw_attention(Path("a.png"), torch.rand(3, height, width), [attention], (0, 0))
    with Image.open("a.png") as picture:
        assert 150 < min(picture.size) <= max(picture.size) < 1500


def test_no_maps_are_reported():
    with pytest.raises(ValueError, match="`maps` must hold at least one attention map, got none"):
        draw_attention(Path("b.png"), torch.rand(3, 8, 8), [], (0, 0))
