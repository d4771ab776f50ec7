"""Necks and backbones with random options: they work, or the constructor raises ValueError."""

import copy

import pytest
import torch
from helpers.fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from shunted_lit import ShuntedBackbone, ShuntedTransformer


@st.composite
def neck_options(draw):
    """Options of a neck, most of them valid."""
    ratios = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    heads = len(ratios) * draw(st.integers(1, 2))
    options = {
        "cin": heads * draw(st.integers(1, 4)),
        "depth": draw(st.integers(1, 3)),
        "num_heads": heads,
        "mlp_ratios": draw(st.sampled_from([1, 2.5, 4])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "ratios": ratios,
        "aggregation": draw(st.sampled_from(["conv", "avg", "max", "linear"])),
        "local_enhancement": draw(st.sampled_from(["before", "after", "none"])),
        "feed_forward": draw(st.sampled_from(["detail", "conventional"])),
        **draw(st.sampled_from([{}, {"layer_scale": 0.0}, {"layer_scale": 0.5}, {"identity_start": True}])),
        "form": draw(st.sampled_from(["reference", "light"])),
    }
    faults = {"cin": 0, "depth": 0, "num_heads": 5, "mlp_ratios": 0.01, "ratios": (0,), "feed_forward": "none such"}
    fault = draw(st.sampled_from([None] * 24 + [*faults]))
    return options if fault is None else {**options, fault: faults[fault]}


DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def check_network(model, x, shape):
    """Check shape, finite values and gradients, and that a copy with the loaded weights gives the same output."""
    output = model(x)
    assert output.shape == shape
    assert output.dtype == x.dtype
    assert output.isfinite().all()
    output.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    copied = copy.deepcopy(model)
    for parameter in copied.parameters():
        parameter.data.zero_()
    copied.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(copied.eval()(x), model.eval()(x))


@examples(12, 3000)
@given(neck_options(), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), DTYPES)
def test_a_neck_works_or_raises(options, height, width, batch, dtype):
    try:
        model = ShuntedTransformer(**options, dtype=dtype)
    except ValueError as error:
        assert str(error)
        return
    check_network(
        model, torch.randn(batch, options["cin"], height, width, dtype=dtype), (batch, options["cin"], height, width)
    )


@st.composite
def backbone_options(draw):
    stages = draw(st.integers(1, 4))
    heads = [draw(st.sampled_from([1, 2, 4])) for _ in range(stages)]
    lists = {
        "dims": [head * draw(st.sampled_from([2, 4, 6])) for head in heads],
        "num_heads": heads,
        "depths": [draw(st.sampled_from([1, 1, 2])) for _ in range(stages)],
        "mlp_ratios": [draw(st.sampled_from([1, 2, 4])) for _ in range(stages)],
        "ratios": [tuple(draw(st.sampled_from([1, 2, 4, 8])) for _ in range(min(head, 2))) for head in heads],
    }
    shortened = draw(st.sampled_from([None] * 24 + [*lists]))
    if shortened:
        lists[shortened] = lists[shortened][:-1]
    return {
        **lists,
        "num_classes": draw(st.sampled_from([0, 1, 5])),
        "stem": draw(st.sampled_from(["shunted", "patch4", "patch16"])),
    }


@examples(8, 1000)
@given(backbone_options(), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2), DTYPES)
def test_a_backbone_works_or_raises(options, height, width, batch, dtype):
    try:
        model = ShuntedBackbone(**options, dtype=dtype).eval()  # BatchNorm can't train on one pixel
    except ValueError as error:
        assert str(error)
        return
    count = options["num_classes"] or options["dims"][-1]
    if dtype is torch.bfloat16:  # its strided convolutions read uninitialized memory where a map has one column
        width += 64
    check_network(model, torch.randn(batch, 3, height, width, dtype=dtype), (batch, count))


@pytest.mark.slow
@examples(3, 40)
@given(neck_options(), st.integers(3, 9), st.integers(3, 9))
def test_an_exported_neck_gives_the_same_output(options, height, width):
    try:
        model = ShuntedTransformer(**options).eval()
    except ValueError:
        return
    minimum = max(options["ratios"]) + 1  # an exported program accepts no map with a single row
    sizes = {0: torch.export.Dim("b"), 2: torch.export.Dim("h", min=minimum), 3: torch.export.Dim("w", min=minimum)}
    program = torch.export.export(model, (torch.randn(2, options["cin"], 24, 20),), dynamic_shapes=(sizes,))
    x = torch.randn(3, options["cin"], height * 4, width * 4)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)
