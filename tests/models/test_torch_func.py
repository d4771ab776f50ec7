"""The transforms of `torch.func`, and derivatives of second order: against loops and finite differences."""

import pytest
import timm
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from shunted_lit import ShuntedTransformer
from shunted_lit.models import ops


@pytest.fixture
def neck():
    torch.manual_seed(0)
    return ShuntedTransformer(16, 1, sr_ratios=4, layer_scale=0.5).eval()


@pytest.fixture(params=["neck", "backbone"])
def model_and_input(request, neck):
    if request.param == "neck":
        return neck, torch.randn(2, 16, 5, 7)
    settings = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (2, 2, 2, 2), "mlp_ratios": (2, 2, 2, 2)}
    return timm.create_model("shunted_t", **settings, num_classes=5).eval(), torch.randn(2, 3, 40, 33)


def loss_of(model):
    """Return a loss of parameters and one sample (C, H, W) that is not constant after the last norm."""

    def loss(parameters, x):
        out = functional_call(model, parameters, (x[None],))
        return (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum()

    return loss


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_vmap_over_samples_equals_a_batch(model_and_input, mode):
    model, x = model_and_input
    with mode():
        torch.testing.assert_close(vmap(lambda sample: model(sample[None])[0])(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_per_sample_equal_those_of_a_loop(model_and_input, recomputed, monkeypatch):
    model, x = model_and_input
    if recomputed:
        monkeypatch.setattr(ops, "WIDE", 1)  # as for large maps
    parameters, loss = dict(model.named_parameters()), loss_of(model)
    gradients = vmap(grad(loss), (None, 0))({name: p.detach() for name, p in parameters.items()}, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(gradients[name][i], value, rtol=1e-3, atol=1e-5, msg=name)


def test_fast_paths_are_left_out_in_transforms_alone():
    x = torch.zeros(2, 3)
    seen = []
    vmap(lambda row: seen.append(ops.is_plain_eager()) or row)(x)
    assert seen == [False]
    assert ops.is_plain_eager()
    with torch.no_grad():
        assert ops.can_overwrite(x)


def test_jvp_equals_finite_differences(model_and_input):
    model, x = model_and_input
    model, x = model.double(), x.double()
    tangent, step = torch.randn_like(x), 1e-6
    with sdpa_kernel(SDPBackend.MATH):
        _, derivative = jvp(model, (x,), (tangent,))
        with dual_level():
            derivative_of_dual = unpack_dual(model(make_dual(x, tangent))).tangent
    with torch.no_grad():
        expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(derivative_of_dual, derivative)


@pytest.mark.parametrize("recomputed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_second_derivatives_equal_finite_differences(neck, recomputed, monkeypatch):
    if recomputed:
        monkeypatch.setattr(ops, "WIDE", 1)
    x = torch.randn(1, 16, 3, 5, dtype=torch.float64, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert gradcheck(neck.double(), x, fast_mode=True)
        assert gradgradcheck(neck, x, fast_mode=True)
