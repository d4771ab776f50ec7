"""The architecture against outputs of the reference implementation and against the paper's formulas."""

import copy
import io
import pickle
from functools import partial

import pytest
import timm
import torch
from helpers import plain_shunted as plain
from helpers.golden_cases import CASES, OUTPUTS, build, draw, outputs, reference_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shunted_lit import ShuntedBackbone, ShuntedSelfAttention, ShuntedTransformer
from shunted_lit.models import ops
from shunted_lit.models.shunted import DetailSpecificFeedForward
from shunted_lit.models.weights import SR_RATIOS, from_reference_names

NECKS = [name for name, case in CASES.items() if case["kind"] == "neck"]


GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_equal_the_reference(name, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions would use it
    case = CASES[name]
    model = build(case)
    model.load_state_dict(reference_weights(case), strict=True)
    model = model.to(device)
    assert sum(p.numel() for p in model.parameters()) == case["params"]
    x = draw(case["salt"] + 1, case["input_shape"]).to(device).requires_grad_()
    results = outputs(case, model, x)
    for key, expected in case["outputs"].items():
        assert list(results[key].shape) == expected["shape"]
        sampled = results[key].detach().flatten()[:: case["sample_stride"]].cpu()
        torch.testing.assert_close(sampled, OUTPUTS[f"{name}/{key}"], rtol=0, atol=2e-5)
    if "grad_norms" not in case:
        return
    weights = draw(case["salt"] + 2, case["outputs"]["output"]["shape"]).to(device)
    (100 * (results["output"] * weights).mean()).backward()
    expected_norms = from_reference_names(case["grad_norms"])
    norms = {key: parameter.grad.norm().item() for key, parameter in model.named_parameters()}
    assert norms.keys() == expected_norms.keys()
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert x.grad.norm().item() == pytest.approx(case["input_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("device", [GPU])
def test_bfloat16_on_a_gpu_is_close_to_the_reference(device, compiled):
    case = CASES["neck_512"]
    model = build(case)
    model.load_state_dict(reference_weights(case))
    run = torch.compile(model.to(device), mode="reduce-overhead") if compiled else model.to(device)
    for _ in range(3):  # the third call is the first that replays a CUDA graph
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            result = run(draw(case["salt"] + 1, case["input_shape"]).to(device))
    sampled = result.float().cpu().flatten()[:: case["sample_stride"]]
    expected = OUTPUTS["neck_512/output"]
    assert (sampled - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("wrap", ["flat", "model", "module", "model and module"])
@pytest.mark.parametrize("name", ["neck_small_sr2", "neck_small_sr1", "shunted_t"])
def test_reference_checkpoints_load(name, wrap):
    model, weights = build(CASES[name]), reference_weights(CASES[name])
    expected = from_reference_names(weights)
    if "module" in wrap:
        weights = {f"module.{key}": value for key, value in weights.items()}
    if "model" in wrap:
        weights = {"model": weights, "optimizer": {}, "epoch": 299}
    given_names = list(weights)
    model.load_state_dict(weights, strict=True)
    assert list(weights) == given_names, "the caller's dict must not change"
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_reference_checkpoints_load_inside_another_module():
    case = CASES["neck_small_sr4"]
    outer = nn.ModuleDict({"neck": build(case)})
    outer.load_state_dict({f"neck.{key}": value for key, value in reference_weights(case).items()}, strict=True)
    twin = build(case)
    twin.load_state_dict(reference_weights(case))
    x = draw(0, case["input_shape"])
    torch.testing.assert_close(outer["neck"](x), twin(x), rtol=0, atol=0)


def test_strict_loading_names_missing_and_unexpected_weights():
    model, weights = build(CASES["neck_small_sr2"]), reference_weights(CASES["neck_small_sr2"])
    weights["block.0.attn.kv3.weight"] = weights.pop("block.0.attn.kv2.weight")
    message = (
        r"1 missing \(block\.0.*groups\.1\.kv\.weight\), 1 unexpected \(.*groups\.2\.kv\.weight\)\. They fit Shunted"
    )
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(weights)


def test_state_dict_round_trip():
    model = ShuntedTransformer(cin=16, depth=2, ratios=(4, 2, 1, 1), num_heads=4)
    twin = ShuntedTransformer(cin=16, depth=2, ratios=(4, 2, 1, 1), num_heads=4)
    twin.load_state_dict(model.state_dict())
    for key, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


# --- the paper's formulas at any size, with any ratios


@st.composite
def necks(draw):
    groups = draw(st.integers(1, 4))
    ratios = tuple(draw(st.lists(st.integers(1, 5), min_size=groups, max_size=groups)))
    num_heads = groups * draw(st.integers(1, 2))
    form = draw(st.sampled_from(["reference", "light"]))
    return {
        "cin": num_heads * draw(st.sampled_from([2, 3])) * (2 if form == "light" else 1),
        "form": form,
        "identity_start": draw(st.booleans()),
        "depth": draw(st.integers(1, 2)),
        "num_heads": num_heads,
        "mlp_ratios": draw(st.sampled_from([1, 2.5])),
        "qkv_bias": draw(st.booleans()),
        "qk_scale": draw(st.sampled_from([None, 0.3])),
        "ratios": ratios,
    }


@settings(deadline=None, max_examples=40)
@given(necks(), st.integers(1, 13), st.integers(1, 13), st.integers(1, 2), st.integers(0, 2**31))
def test_neck_equals_the_formulas_at_any_size(keywords, height, width, batch, seed):
    torch.manual_seed(seed)
    model = ShuntedTransformer(**keywords, dtype=torch.float64).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(batch, keywords["cin"], height, width, dtype=torch.float64)
    with torch.no_grad():
        result = model(x)
        expected = plain.neck(
            x, model.state_dict(), keywords["depth"], keywords["num_heads"], keywords["ratios"], keywords["qk_scale"],
            adds_input=keywords["identity_start"],
        )  # fmt: skip
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sr_ratio", SR_RATIOS)
def test_sr_ratio_stands_for_a_tuple_of_ratios(sr_ratio):
    torch.manual_seed(0)
    short = ShuntedTransformer(cin=8, depth=1, sr_ratios=sr_ratio)
    long = ShuntedTransformer(cin=8, depth=1, ratios=SR_RATIOS[sr_ratio])
    also = ShuntedTransformer(cin=8, depth=1, sr_ratios=SR_RATIOS[sr_ratio])
    for twin in (long, also):
        twin.load_state_dict(short.state_dict())
        x = torch.randn(1, 8, 9, 7)
        torch.testing.assert_close(twin(x), short(x), rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [2, 3, 4, 8])
def test_padding_keeps_every_token(ratio):
    heads = ShuntedSelfAttention(4, 2, (ratio, 1)).groups[0]
    for size in range(1, 2 * ratio + 2):
        x = torch.randn(1, size * (size + 1), 4, requires_grad=True)
        merged = heads.aggregate(x, (size, size + 1))
        assert merged.shape == (1, 4, -(-size // ratio), -(-(size + 1) // ratio))
        merged.square().sum().backward()
        assert (x.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("height", [1, 2, 5, 30, 33, 64])
@pytest.mark.parametrize("width", [1, 7, 31, 64])
def test_backbone_takes_any_image(height, width):
    model = ShuntedBackbone(dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2), num_classes=3).eval()
    _, maps = model.forward_intermediates(torch.randn(2, 3, height, width))
    for i, x in enumerate(maps, 2):
        assert x.shape[2:] == (-(-height // 2**i), -(-width // 2**i))
    assert model(torch.randn(2, 3, height, width)).shape == (2, 3)


# --- keywords and methods


def test_default_norm_is_that_of_the_reference():
    assert ShuntedTransformer(cin=4, depth=1).block[0].norm1.eps == 1e-5
    assert ShuntedTransformer(cin=4, depth=1, norm_layer=partial(nn.LayerNorm, eps=1e-3)).norm.eps == 1e-3
    assert isinstance(ShuntedTransformer(cin=4, depth=1, norm_layer=nn.RMSNorm).block[0].norm2, nn.RMSNorm)
    assert ShuntedTransformer(cin=4, depth=1, norm_layer=lambda dim: nn.LayerNorm(dim)).norm.eps == 1e-5


def test_initial_weights_follow_the_reference():
    torch.manual_seed(0)
    model = ShuntedTransformer(cin=64, depth=2)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not module.bias.any()
        elif isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] ** 2 * module.out_channels / module.groups
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert not module.bias.any()


def test_stochastic_depth_rises_to_its_rate_and_drops_blocks():
    model = ShuntedTransformer(cin=8, depth=3, drop_path_rate=1.0)
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in model.block]
    assert rates == pytest.approx([0.0, 0.5, 1.0])
    x, size = torch.randn(4, 36, 8), (6, 6)
    last = model.block[2]
    assert torch.equal(last.train()(x, size), x), "a rate of 1 leaves the residual path alone"
    assert not torch.equal(last.eval()(x, size), x)
    torch.manual_seed(0)
    middle = model.block[1].train()
    kept = [bool((middle(x[:1], size) != x[:1]).any()) for _ in range(200)]
    assert 0.6 < sum(kept) / len(kept) < 0.9  # 1 - 0.5 ** 2: either branch


def test_backbone_spreads_stochastic_depth_over_all_blocks():
    model = timm.create_model("shunted_t", drop_path_rate=0.7)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


@pytest.mark.parametrize("keyword", ["drop_rate", "attn_drop_rate"])
def test_dropout_acts_in_training_only(keyword):
    torch.manual_seed(0)
    still = ShuntedTransformer(cin=8, depth=1)
    model = ShuntedTransformer(cin=8, depth=1, **{keyword: 0.5})
    model.load_state_dict(still.state_dict())
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(model.eval()(x), still.eval()(x))
    assert not torch.equal(model.train()(x), model(x))


def test_full_attention_dropout_leaves_the_bias_of_the_projection():
    attention = ShuntedSelfAttention(8, 2, (2, 1), attn_drop=1.0).train()
    out = attention(torch.randn(2, 16, 8), (4, 4))
    torch.testing.assert_close(out, attention.proj.bias.expand_as(out))


@pytest.mark.parametrize("model", [ShuntedTransformer(cin=8, depth=1), timm.create_model("shunted_t")])
def test_freeze_patch_embed_stops_only_the_patch_embedding(model):
    model.freeze_patch_embed()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(("patch_embed.", "stages.0.patch_embed."))}
    model(torch.randn(2, 8 if hasattr(model, "cin") else 3, 8, 8)).sum().backward()
    assert all((p.grad is None) == (name in frozen) for name, p in model.named_parameters())


@pytest.mark.parametrize("model", [ShuntedTransformer(cin=8, depth=1), timm.create_model("shunted_t")])
def test_no_weight_decay_names_norms_and_biases(model):
    norms = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
    }
    biases = {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert model.no_weight_decay() == norms | biases


def test_output_is_channels_last_and_layout_is_never_copied():
    model = ShuntedTransformer(cin=16, depth=2, sr_ratios=2).eval()
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        tokens, size = model.patch_embed(x)
        assert tokens.is_contiguous()
        for block in model.block:
            tokens = block(tokens, size)
            assert tokens.is_contiguous()
        with RecordOperations() as operations:
            out = model(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert "aten.convolution.default" in operations.names
    assert not operations.names & {"aten.clone.default", "aten.copy_.default", "aten._to_copy.default"}


class RecordOperations(TorchDispatchMode):
    """Record the names of the operators that run, such as copies to another memory layout."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
def test_pooling(pool):
    model = timm.create_model("shunted_t", num_classes=5, global_pool=pool).eval()
    x = torch.randn(2, 3, 40, 64)
    maps = model.forward_features(x)
    mean, most = maps.mean((2, 3)), maps.amax((2, 3))
    pooled = {"avg": mean, "max": most, "avgmax": (mean + most) / 2}[pool]
    torch.testing.assert_close(model.forward_head(maps, pre_logits=True), pooled)
    torch.testing.assert_close(model(x), model.get_classifier()(pooled))


def test_head_without_pooling_classifies_each_position():
    model = timm.create_model("shunted_t", num_classes=5, global_pool="").eval()
    x = torch.randn(2, 3, 64, 96)
    scores = model(x)
    assert scores.shape == (2, 5, 2, 3)
    place = model.forward_features(x)[0, :, 1, 2]
    torch.testing.assert_close(scores[0, :, 1, 2], model.get_classifier()(place))


# --- errors


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cin": 10, "num_heads": 4}, "`num_heads` must divide the channels, got 4 heads and 10 channels"),
        ({"cin": 9, "num_heads": 3}, r"multiple of the number of `ratios`, got 3 and \(2, 1\)"),
        ({"cin": 8, "num_heads": 4, "ratios": (4, 2, 1)}, r"multiple of the number of `ratios`, got 4 and \(4, 2, 1\)"),
        ({"cin": 8, "ratios": (2, 0)}, r"`ratios` must hold .* at least 1 per head group, got \(2, 0\)"),
        ({"cin": 8, "ratios": ()}, r"`ratios` must hold .* at least 1 per head group, got \(\)"),
        ({"cin": 8, "sr_ratios": 3}, r"`sr_ratio` must be one of \[1, 2, 4, 8\].* got 3; .* such as \(3, 1\)"),
        ({"cin": 8, "depth": 0}, "`depth` must be at least 1, got 0"),
        ({"cin": 8, "drop_path_rate": 2}, "`drop_path_rate` must be between 0 and 1, got 2"),
        ({"cin": 8, "attn_drop_rate": -1.0}, "`attn_drop` must be between 0 and 1, got -1.0"),
        ({"cin": 8, "mlp_ratios": 0.1}, "`mlp_ratio` must give at least 1 hidden channel, got 0.1 times 8"),
        ({"cin": 8, "num_heads": 0}, "`num_heads` must divide the channels, got 0 heads and 8 channels"),
    ],
)
def test_invalid_settings_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        ShuntedTransformer(**keywords)


@pytest.mark.parametrize("shape", [(8, 4, 4), (1, 7, 4, 4), (1, 1, 8, 4, 4), (2, 8), (1, 8, 0, 4)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=rf"must have the shape \(B, 8, H, W\), H and W >= 1, got \[{shape[0]}, "):
        ShuntedTransformer(cin=8, depth=1)(torch.randn(*shape))


def test_invalid_backbones_are_refused():
    with pytest.raises(ValueError, match=r"one entry per stage, got \[4, 4, 3, 4, 4\] entries"):
        ShuntedBackbone(num_heads=(2, 4, 8))
    with pytest.raises(ValueError, match=r"`global_pool` must be one of .*avg.* got 'attention'"):
        ShuntedBackbone(global_pool="attention")
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\).* got \[1, 1, 32, 32\]"):
        timm.create_model("shunted_t")(torch.randn(1, 1, 32, 32))


# --- loading a neck from a checkpoint


def test_from_checkpoint_of_the_reference(tmp_path):
    case = CASES["neck_small_sr8"]
    torch.save({"model": reference_weights(case)}, tmp_path / "reference.pth")
    keywords = {key: value for key, value in case["args"].items() if key not in ("cin", "depth")}
    neck = ShuntedTransformer.from_checkpoint(
        tmp_path / "reference.pth", **keywords, norm_layer=partial(nn.LayerNorm, eps=1e-6)
    )
    out = neck(draw(case["salt"] + 1, case["input_shape"])).detach().flatten()[:: case["sample_stride"]]
    torch.testing.assert_close(out, OUTPUTS["neck_small_sr8/output"], rtol=0, atol=2e-5)


def test_from_checkpoint_without_a_neck(tmp_path):
    torch.save({"state_dict": {"detector.head.weight": torch.zeros(1)}}, tmp_path / "none.ckpt")
    with pytest.raises(ValueError, match="holds no neck; none of its 1 tensors"):
        ShuntedTransformer.from_checkpoint(tmp_path / "none.ckpt")


# --- fast paths equal plain formulas


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_residual_depthwise_gelu_equals_its_formula(mode):
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    weight, bias = torch.randn(6, 1, 3, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    expected = plain.gelu(x + plain.depthwise(x, weight, bias))
    with mode():
        result = ops.residual_depthwise_gelu(x.flatten(1, 2), (5, 7), weight, bias)
    torch.testing.assert_close(result.unflatten(1, (5, 7)), expected)


@given(
    batch=st.integers(0, 3), height=st.integers(1, 11), width=st.integers(1, 11),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), mixed=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_inference_mode_equals_other_modes(batch, height, width, dtype, mixed):
    """Compare oneDNN's fused convolution and GELU with torch's own two operators."""
    torch.manual_seed(0)
    layer = DetailSpecificFeedForward(16, 32, dtype=dtype).eval()
    x = torch.randn(batch, height * width, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed and dtype == torch.float32):
        with torch.inference_mode():
            result = layer(x, (height, width))
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            expected = layer(x, (height, width))
    error = 1e-5 if result.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result, expected, rtol=error, atol=error)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="oneDNN fuses only on AVX-512")
def test_convolution_and_gelu_are_fused_only_in_inference_mode(neck):
    x = torch.randn(1, 8, 5, 7)

    def operators(context):
        with context, torch.profiler.profile() as profile:
            neck.eval()(x)
        return {event.name for event in profile.events()}

    fused = "mkldnn::_convolution_pointwise"
    assert fused in operators(torch.inference_mode())
    assert fused not in operators(torch.no_grad())
    with torch.inference_mode():
        assert fused not in str(torch.jit.trace(neck, x).inlined_graph)
        scripted = torch.jit.script(neck)
        torch.testing.assert_close(scripted(x), neck(x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_gives_the_same_gradients_and_saves_memory(monkeypatch, dropout):
    model = ShuntedTransformer(cin=8, depth=2, num_heads=4, ratios=(2, 1), drop_rate=dropout, dtype=torch.float64)
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    gradients, kept = [], []
    for wide in (10**9, 0):
        monkeypatch.setattr(ops, "WIDE", wide)
        model.zero_grad()
        torch.manual_seed(0)
        saved = []

        def keep(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(x).square().sum()
        kept.append(sum(saved))
        loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    assert kept[1] < 0.75 * kept[0], "recomputation must keep less for the backward pass"


@pytest.mark.parametrize("shape", [(1, 12, 16), (2, 1, 1), (2, 5, 13)])
def test_plain_attention_is_as_precise_as_fused_attention_in_bfloat16(monkeypatch, shape):
    torch.manual_seed(0)
    model = ShuntedTransformer(cin=32, depth=2)
    B, H, W = shape
    x = torch.randn(B, 32, H, W)
    exact = model(x)
    errors = []
    for limit in (0, 2**24):
        monkeypatch.setattr(ops, "SMALL_ATTENTION", limit)
        with torch.autocast("cpu", torch.bfloat16):
            errors.append((model(x).float() - exact).norm() / exact.norm())
    assert max(errors) < 0.02
    assert errors[1] < 1.5 * errors[0], "plain attention must not be less precise"


@pytest.mark.parametrize("limit", [0, 2**24])
def test_attention_dropout_in_bfloat16_keeps_the_mean(monkeypatch, limit):
    monkeypatch.setattr(ops, "SMALL_ATTENTION", limit)
    q, k = (torch.zeros(1, 1, n, 4, dtype=torch.bfloat16) for n in (200, 300))
    v = torch.ones(1, 1, 300, 4, dtype=torch.bfloat16)
    out = ops.attention(q, k, v, 1.0, 0.5).float()
    assert out.std() > 0.01
    assert out.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_neck_compiles_in_bfloat16(neck):
    neck = neck.bfloat16()
    x = torch.randn(1, 8, 5, 7, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(neck, fullgraph=True)(x), neck(x), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(checkpointing, neck):
    twin = copy.deepcopy(neck)
    twin.grad_checkpointing = checkpointing
    x = torch.randn(2, 8, 6, 5)
    for model in (neck, twin):
        model(x).square().sum().backward()
    for one, other in zip(neck.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# --- the layer scale, which the reference does not have


def test_layer_scale_adds_the_input():
    plain = ShuntedTransformer(cin=8, depth=1)
    neck = ShuntedTransformer(cin=8, depth=1, layer_scale=0.5)
    gamma = torch.randn(8)
    neck.load_state_dict({**plain.state_dict(), "layer_scale.gamma": gamma})
    x = torch.randn(2, 8, 5, 7)
    out = neck(x)
    torch.testing.assert_close(out, x + gamma.view(1, 8, 1, 1) * plain(x))
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert "layer_scale.gamma" not in plain.state_dict()
    with pytest.raises(ValueError, match=r"1 unexpected \(layer_scale\.gamma\).*layer_scale=0\.0\)"):
        plain.load_state_dict(neck.state_dict())
    with pytest.raises(ValueError, match=r"1 missing \(layer_scale\.gamma\)"):
        neck.load_state_dict(plain.state_dict())


def test_layer_scale_of_zero_starts_as_an_identity_and_then_learns():
    neck = ShuntedTransformer(cin=8, depth=1, layer_scale=0.0)
    optimizer = torch.optim.SGD(neck.parameters(), lr=0.1)
    x = torch.randn(2, 8, 5, 7)
    for step in range(2):
        out = neck(x)
        if step == 0:
            assert torch.equal(out, x)
        optimizer.zero_grad()
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        still = {name for name, p in neck.named_parameters() if not p.grad.any()}
        assert "layer_scale.gamma" not in still
        assert bool(still) is (step == 0), f"step {step}: no gradient in {still}"
        optimizer.step()


def test_from_checkpoint_reads_the_layer_scale(tmp_path):
    neck = ShuntedTransformer(cin=8, depth=1, layer_scale=0.5)
    torch.save({"state_dict": {f"x.necks.5.{k}": v for k, v in neck.state_dict().items()}}, tmp_path / "run.ckpt")
    twin = ShuntedTransformer.from_checkpoint(tmp_path / "run.ckpt")
    x = torch.randn(1, 8, 5, 7)
    torch.testing.assert_close(twin(x), neck(x), rtol=0, atol=0)


# --- the identity start and the light form, which the reference does not have


@pytest.mark.parametrize("form", ["reference", "light"])
def test_identity_start_keeps_the_input_to_the_bit(form):
    neck = ShuntedTransformer(cin=16, depth=2, form=form, identity_start=True)
    x = torch.randn(2, 16, 5, 7)
    assert torch.equal(neck(x), x)
    assert neck(x).is_contiguous(memory_format=torch.channels_last)


def share_after_200_steps(**options):
    """Train where the neck is needed, to tell whether a place is brighter than its image, and return what it adds.

    Returns:
        The norm of what the neck adds, relative to that of its input; and the loss.
    """
    torch.manual_seed(0)
    neck = ShuntedTransformer(cin=16, depth=1, **options)
    network = nn.Sequential(nn.Conv2d(1, 16, 1), neck, nn.Conv2d(16, 1, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(200):
        x = torch.randn(8, 1, 8, 8) + 3 * torch.randn(8, 1, 1, 1)
        target = (x > x.mean((2, 3), keepdim=True)).float()
        loss = nn.functional.binary_cross_entropy_with_logits(network(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        features = network[0](x)
        return float((neck(features) - features).norm() / features.norm()), float(loss.detach())


def test_identity_start_learns_more_than_a_layer_scale():
    share, loss = share_after_200_steps(identity_start=True)
    scaled_share, scaled_loss = share_after_200_steps(layer_scale=0.0)
    assert share > 0.5, share
    assert share > 2 * scaled_share, (share, scaled_share)
    assert loss < scaled_loss, (loss, scaled_loss)


def test_the_light_form_learns_from_its_identity_start():
    share, _ = share_after_200_steps(form="light", identity_start=True)
    assert share > 0.2, share


@pytest.mark.parametrize(
    "options", [{"form": "light"}, {"identity_start": True}, {"form": "light", "identity_start": True}]
)
def test_forms_are_recognized_by_their_weights(options, tmp_path):
    neck = ShuntedTransformer(cin=16, depth=1, **options)
    nn.init.normal_(neck.out_proj.weight)
    torch.save({"state_dict": {f"x.necks.5.{k}": v for k, v in neck.state_dict().items()},
                "hyper_parameters": {"neck": {"depth": 1, **options}}}, tmp_path / "run.ckpt")  # fmt: skip
    x = torch.randn(1, 16, 5, 7)
    torch.testing.assert_close(ShuntedTransformer.from_checkpoint(tmp_path / "run.ckpt")(x), neck(x), rtol=0, atol=0)
    plain = ShuntedTransformer(cin=16, depth=1)
    with pytest.raises(ValueError, match=r"They fit ShuntedTransformer\(.*" + next(iter(options))):
        plain.load_state_dict(neck.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "heavy"}, "`form` must be one of light, reference, got 'heavy'"),
        (
            {"identity_start": True, "layer_scale": 0.0},
            "`layer_scale` must be None where `identity_start` adds the input",
        ),
        ({"form": "light", "cin": 2}, "`num_heads` must divide the channels, got 2 heads and 1 channels"),
    ],
)
def test_forms_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ShuntedTransformer(**{"cin": 8, **options})


# --- copying, exporting and compiling


@pytest.fixture(params=[{}, {"layer_scale": 0.5}, {"form": "light"}], ids=["reference", "layer scale", "light"])
def neck(request):
    torch.manual_seed(0)
    return ShuntedTransformer(cin=8, depth=1, num_heads=4, ratios=(4, 1), **request.param).eval()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "script", "trace"])
def test_copies_give_the_same_output(neck, how):
    x = torch.randn(1, 8, 5, 7)
    if how == "deepcopy":
        twin = copy.deepcopy(neck)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(neck))
    elif how == "save":
        buffer = io.BytesIO()
        torch.save(neck, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    elif how == "script":
        twin = torch.jit.script(neck)
    else:
        twin = torch.jit.trace(neck, torch.randn(1, 8, 4, 4))
    torch.testing.assert_close(twin(x), neck(x))
    with torch.no_grad():
        torch.testing.assert_close(twin(x[..., :1, :3]), neck(x[..., :1, :3]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_neck_in_other_precisions(neck, dtype):
    x = torch.randn(1, 8, 5, 7)
    expected = neck(x)
    out = neck.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_neck_on_the_meta_device():
    neck = ShuntedTransformer(cin=8, depth=1, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in neck.parameters()} == {"meta"}
    assert {p.dtype for p in neck.parameters()} == {torch.bfloat16}
    assert neck(torch.empty(2, 8, 3, 3, device="meta", dtype=torch.bfloat16)).shape == (2, 8, 3, 3)


@pytest.mark.slow
def test_neck_compiles_as_one_graph(neck):
    x = torch.randn(1, 8, 5, 7)
    torch.testing.assert_close(torch.compile(neck, fullgraph=True)(x), neck(x), rtol=1e-4, atol=1e-5)


def test_neck_exports_with_dynamic_sizes(neck):
    # torch.export treats sizes of 1 as constants, so maps must be larger than the largest ratio, 4.
    height, width = torch.export.Dim("height", min=5, max=640), torch.export.Dim("width", min=5, max=640)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64), 2: height, 3: width}
    program = torch.export.export(neck, (torch.randn(2, 8, 9, 11),), dynamic_shapes=(dynamic,)).module()
    for shape in [(2, 8, 5, 5), (3, 8, 13, 6), (2, 8, 8, 40)]:
        x = torch.randn(*shape)
        torch.testing.assert_close(program(x), neck(x), rtol=1e-4, atol=1e-5)


def test_exported_attention_splits_nothing_into_one_part():
    """LiteRT's converter fails at such a split, of any operator that returns a list."""
    for sr_ratio, heads in {1: 1, 2: 2}.items():
        neck = ShuntedTransformer(8, 1, sr_ratios=sr_ratio, num_heads=2).eval()
        graph = torch.export.export(neck, (torch.randn(1, 8, 4, 4),)).run_decompositions().graph
        users = [[user.target for user in node.users] for node in graph.nodes if "split" in str(node.target)]
        assert len(users) == (heads > 1) + heads, "queries, and keys and values of each group"
        assert all(len(targets) == 2 for targets in users)
