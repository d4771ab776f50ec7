"""Shunted Transformer: the whole architecture, from one head group to the four-stage backbone.

Paper: Ren, Zhou, He, Feng, Wang, "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022,
https://arxiv.org/abs/2111.15193. Section numbers below are the paper's.

Read from top to bottom: token aggregation and attention of one head group -> shunted self-attention ->
detail-specific feed-forward -> block -> patch embedding -> stage -> the neck -> the backbone and its variants.

Tokens are (B, H * W, C), contiguous, from the patch embedding to the last norm; their `size` (H, W) goes with them.
That is the memory layout of a channels_last (B, C, H, W) image, so convolutions run on a view, and nothing is copied to
change layout, neither here nor in a runtime that this is exported to.

Where this departs from the authors' code (same weights, same results wherever theirs runs without losing tokens):
maps that a ratio does not divide are padded with zeros at the right and bottom, where theirs drops the last rows and
columns; any tuple of ratios works, where theirs knows three pairs; attention matrices are never held in memory.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerScale2d
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from shunted_lit.models.weights import ReferenceWeightsMixin, from_reference_names, infer_neck_keywords, read_checkpoint

log = logging.getLogger(__name__)

__all__ = ["DetailSpecificFeedForward", "ShuntedBackbone", "ShuntedSelfAttention", "ShuntedTransformer"]

# The authors' `sr_ratio`, one number a stage, stands for these ratios r_i, one a head group, coarse heads first.
SR_RATIOS = {8: (8, 4), 4: (4, 2), 2: (2, 1), 1: (1,)}


def parse_ratios(sr_ratio: int | Sequence[int]) -> tuple[int, ...]:
    """Ratios r_i of the head groups: a tuple of them as it is, or the pair that the authors' `sr_ratio` stands for.

    Raises:
        ValueError: an `sr_ratio` that the authors' code does not know, no ratio at all, or a ratio below 1.
    """
    if isinstance(sr_ratio, int):
        if sr_ratio not in SR_RATIOS:
            raise ValueError(
                f"sr_ratio is {sr_ratio}, but the source knows {sorted(SR_RATIOS)} only; "
                f"name the ratio of each head group instead, such as ({sr_ratio}, 1)"
            )
        return SR_RATIOS[sr_ratio]
    ratios = tuple(sr_ratio)
    if not ratios or any(not isinstance(r, int) or r < 1 for r in ratios):
        raise ValueError(f"ratios are {ratios}, but need one whole number of 1 or more a head group, such as (2, 1)")
    return ratios


Size = tuple[int, int]  # H and W of tokens


def to_image(x: Tensor, size: Size) -> Tensor:
    """Tokens (B, H * W, C) seen as an image (B, C, H, W): a view."""
    return x.reshape(x.shape[0], size[0], size[1], x.shape[2]).permute(0, 3, 1, 2)


def to_tokens(x: Tensor) -> Tensor:
    """An image (B, C, H, W) seen as tokens (B, H * W, C): a view where it is channels_last."""
    return x.flatten(2).transpose(1, 2)


def pad_to_multiple(x: Tensor, r: int) -> Tensor:
    """Zeros at the right and bottom of an image (B, C, H, W), so that `r` divides H and W and no token is lost."""
    H, W = x.shape[2], x.shape[3]
    # -H % r says the same, but breaks torch.export with dynamic sizes.
    return F.pad(x, [0, (W + r - 1) // r * r - W, 0, (H + r - 1) // r * r - H]) if r > 1 else x


def check_channels(x: Tensor, channels: int) -> Tensor:
    """Raises ValueError where `x` is not an image (B, `channels`, H, W) with H and W of 1 or more."""
    if torch.jit.is_tracing():  # which would warn, and could not raise for another input
        return x
    if x.dim() != 4 or x.shape[1] != channels or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"input has the shape {list(x.shape)}, but (B, {channels}, H, W) is needed, H and W >= 1")
    return x


torch.fx.wrap("check_channels")  # a call in a traced graph, not a branch that tracing can't follow


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d): a view."""
    return x.unflatten(-1, (num_heads, x.shape[-1] // num_heads)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
    """softmax(q k^T scale) v of (B, heads, N, d) and (B, heads, M, d) -> (B, heads, N, d)."""
    plain = False if torch.jit.is_scripting() else small(q, k)
    if plain:
        weights = torch.softmax((q * scale) @ k.transpose(-2, -1), -1)
        return F.dropout(weights, dropout) @ v
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)


SMALL_ATTENTION = 2**24  # attention weights: 32 MB in bfloat16


def small(q: Tensor, k: Tensor) -> bool:
    """Whether plain products are faster than torch's fused attention: in bfloat16 on processors, with small maps."""
    exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # with sizes that are free
    if exporting or not q.is_cpu or q.dtype != torch.bfloat16:
        return False
    B, heads, N, _ = q.shape
    return B * heads * N * k.shape[2] <= SMALL_ATTENTION


torch.fx.wrap("attention")


WIDE = 2**21  # elements of a map from which to save memory: below, it costs more time than it is worth


def recomputes(x: Tensor) -> bool:
    """Whether a short stretch with wider maps than x inside is computed again by a backward pass, not kept for it.

    On processors alone: a GPU waits for the bookkeeping, by which an H100's step took longer than the source's.
    """
    # Compilers decide by themselves what to keep, and a symbolic trace (no Tensor) has no backward pass.
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not compiling and isinstance(x, Tensor) and x.is_cpu and x.numel() >= WIDE


def fuses(x: Tensor) -> bool:
    """Whether oneDNN runs a convolution and its GELU in one pass, by the operator that torch.compile has for it.

    It knows no derivatives, hence inference mode alone, and compilers fuse by themselves.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_inference_mode_enabled():
        return False
    plain = type(x) is Tensor and x.is_cpu and x.dtype in (torch.float32, torch.bfloat16)
    has_both = torch.backends.cpu.get_cpu_capability() == "AVX512"  # oneDNN's kernels for these dtypes
    return plain and has_both and bool(torch.backends.mkldnn.enabled)


class ResidualDepthwise(nn.Conv2d):
    """x + depthwise 3x3 convolution of x, (B, N, C) -> the same: one convolution, x in the kernels' centres."""

    def __init__(self, channels: int, **dd):
        super().__init__(channels, channels, 3, padding=1, groups=channels, **dd)

    def forward(self, x: Tensor, size: Size) -> Tensor:  # type: ignore[override]
        if torch.jit.is_tracing():  # torch's older ONNX exporter wants kernels that are not computed
            return x + to_tokens(self._conv_forward(to_image(x, size), self.weight, self.bias))
        return to_tokens(self._conv_forward(to_image(x, size), self.kernel(), self.bias))

    def kernel(self) -> Tensor:
        return self.weight + F.pad(self.weight.new_ones([1, 1, 1, 1]), [1, 1, 1, 1])

    @torch.jit.unused
    def gelu(self, x: Tensor, size: Size) -> Tensor:
        """GELU of what `forward` gives, where `fuses`."""
        kernel, bias = self.kernel().to(x.dtype), self.bias.to(x.dtype)  # type: ignore[union-attr] # x may be autocast
        one, run = [1, 1], torch.ops.mkldnn._convolution_pointwise
        return to_tokens(run(to_image(x, size), kernel, bias, one, one, one, self.groups, "gelu", [], "none"))


class PlainHeads(nn.Module):
    """Heads that attend to every token as it is: all heads of a stage with r = 1 (stage 4 of the paper's Table 1).

    As in the authors' code, local enhancement is here added to what attention returns, not to the values: released
    weights depend on it. There is no aggregation, so no norm and no GELU either.
    """

    ratio: int = 1  # r x r tokens are one key

    def __init__(self, dim: int, num_heads: int, head_dim: int, qkv_bias: bool, scale: float, attn_drop: float, **dd):
        super().__init__()
        self.num_heads, self.scale, self.attn_drop = num_heads, scale, attn_drop
        width = num_heads * head_dim
        self.kv = nn.Linear(dim, 2 * width, bias=qkv_bias, **dd)
        self.local_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, **dd)

    def enhance(self, v: Tensor, size: Size) -> Tensor:
        """LE of Eq. 2: depthwise 3x3 convolution of the values, (B, h * w, C) -> the same."""
        return to_tokens(self.local_conv(to_image(v, size)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Eq. 3: queries (B, N, heads * d) on keys and values (B, n, heads * d) -> (B, N, heads * d)."""
        q, k, v = split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)
        out = attention(q, k, v, self.scale, self.attn_drop if self.training else 0.0)
        return out.transpose(1, 2).flatten(2)

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        """Queries (B, N, heads * d) and tokens (B, N, C) -> (B, N, heads * d)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.attend(q, k, v) + self.enhance(v, size)


class ShuntedHeads(PlainHeads):
    """Heads of one granularity (Sec. 3.1.1): r x r tokens are merged into one before keys and values (MTA, Eq. 2)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, ratio: int, qkv_bias: bool, scale: float,
                 attn_drop: float, aggregation: str, **dd):  # fmt: skip
        super().__init__(dim, num_heads, head_dim, qkv_bias, scale, attn_drop, **dd)
        self.ratio = ratio
        self.sr = AGGREGATIONS[aggregation](dim, ratio, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def aggregate(self, x: Tensor, size: Size) -> Tensor:
        """MTA(.; r) but for norm and GELU: tokens (B, H * W, C) -> an image (B, C, ceil(H / r), ceil(W / r))."""
        return self.sr(pad_to_multiple(to_image(x, size), self.ratio))

    def keys_and_values(self, merged: Tensor) -> Tensor:
        """The rest of it, and the projection: (B, n, C) -> (B, n, 2 * heads * d)."""
        return self.kv(F.gelu(self.norm(merged)))

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        """Queries (B, N, heads * d) and tokens (B, N, C) -> (B, N, heads * d)."""
        image = self.aggregate(x, size)
        merged = to_tokens(image)
        if torch.jit.is_scripting():
            kv = self.keys_and_values(merged)
        elif recomputes(x):
            kv = checkpoint(self.keys_and_values, merged, use_reentrant=False, preserve_rng_state=False)
        else:
            kv = self.keys_and_values(merged)
        k, v = kv.chunk(2, dim=-1)
        return self.attend(q, k, v + self.enhance(v, (image.shape[2], image.shape[3])))


def convolution_of_patches(dim: int, ratio: int, **dd: Any) -> nn.Module:
    """The paper's aggregation: a convolution whose stride is its kernel."""
    return nn.Conv2d(dim, dim, ratio, ratio, **dd)


# What may stand in a network by name; `shunted_lit.models.ablations` adds what the paper compares these with.
AGGREGATIONS: dict[str, Callable[..., nn.Module]] = {"conv": convolution_of_patches}
# Heads of a granularity, and those of plain attention.
LOCAL_ENHANCEMENTS: dict[str, tuple[type[ShuntedHeads], type[PlainHeads]]] = {"before": (ShuntedHeads, PlainHeads)}


def check_variant(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} is {name!r}; choose one of {', '.join(sorted(known))}")


class ShuntedSelfAttention(nn.Module):
    """Shunted self-attention (Sec. 3.1.1): heads in equal groups, each seeing the tokens at its own granularity.

    Args:
        dim: channels C.
        num_heads: heads in all; must divide `dim`, and be divided by the number of ratios.
        ratios: r_i of each head group, coarse or fine in any order; (1,) alone is plain attention (`PlainHeads`).
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the products of queries and keys; head_dim ** -0.5 by default.
        attn_drop, proj_drop: dropout on attention weights and after the output projection.
        aggregation: how r x r tokens are merged, of `AGGREGATIONS`.
        local_enhancement: where values meet their neighbours, of `LOCAL_ENHANCEMENTS`.
        dd: `device` and `dtype` of the parameters.

    Raises:
        ValueError: `dim`, `num_heads` and `ratios` that do not divide, a ratio below 1, a part that is not known.
    """

    def __init__(self, dim: int, num_heads: int, ratios: Sequence[int] = (2, 1), qkv_bias: bool = True,
                 qk_scale: float | None = None, attn_drop: float = 0.0, proj_drop: float = 0.0,
                 aggregation: str = "conv", local_enhancement: str = "before", **dd):  # fmt: skip
        super().__init__()
        ratios = parse_ratios(ratios)
        check_variant("aggregation", aggregation, AGGREGATIONS)
        check_variant("local_enhancement", local_enhancement, LOCAL_ENHANCEMENTS)
        if not 0 <= attn_drop <= 1:
            raise ValueError(f"dropout on attention is {attn_drop}, but 0 to 1 is needed")
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"{dim} channels do not split into {num_heads} heads; choose heads that divide {dim}")
        if num_heads % len(ratios):
            raise ValueError(
                f"{num_heads} heads do not split into {len(ratios)} equal groups, one a ratio of {ratios}; "
                f"choose heads that {len(ratios)} divides, or another number of ratios"
            )
        self.num_heads = num_heads
        head_dim, heads = dim // num_heads, num_heads // len(ratios)
        scale = qk_scale or head_dim**-0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        shunted, plain = LOCAL_ENHANCEMENTS[local_enhancement]
        if ratios == (1,):
            groups: list[nn.Module] = [plain(dim, heads, head_dim, qkv_bias, scale, attn_drop, **dd)]
        else:
            groups = [shunted(dim, heads, head_dim, r, qkv_bias, scale, attn_drop, aggregation, **dd) for r in ratios]
        self.groups = nn.ModuleList(groups)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, H * W, C) of `size` (H, W) -> the same shape."""
        q = self.q(x).chunk(len(self.groups), dim=-1)
        out = torch.cat([group(q[i], x, size) for i, group in enumerate(self.groups)], dim=-1)
        return self.proj_drop(self.proj(out))


class DetailSpecificFeedForward(nn.Module):
    """Feed-forward that sees its neighbours (Sec. 3.1.2): fc2(GELU(h + depthwise3x3(h))) with h = fc1(x)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = ResidualDepthwise(hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, H * W, C) of `size` (H, W) -> the same shape."""
        if torch.jit.is_scripting():
            x = self.refine(self.fc1(x), size)
        elif recomputes(x):
            x = checkpoint(self.refine, self.fc1(x), size, use_reentrant=False, preserve_rng_state=self.drop.p > 0)
        else:
            x = self.refine(self.fc1(x), size)
        return self.drop(x)

    def refine(self, x: Tensor, size: Size) -> Tensor:
        """From the first layer's output to the second's: (B, H * W, hidden) -> (B, H * W, C)."""
        fused = False if torch.jit.is_scripting() else fuses(x)
        if fused:
            x = self.dwconv.gelu(x, size)
        else:
            x = self.dwconv(x, size)  # one name, so that no map is held longer than it is needed: these are the widest
            x = F.gelu(x)
        return self.fc2(self.drop(x))


FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {"detail": DetailSpecificFeedForward}


class Block(nn.Module):
    """Transformer block (Sec. 3.1): x + SSA(LN(x)), then x + FFN(LN(x)), each with stochastic depth."""

    def __init__(self, dim: int, norm_layer: Callable[..., nn.Module], num_heads: int, ratios: Sequence[int],
                 mlp_ratio: float, qkv_bias: bool, qk_scale: float | None, drop: float, attn_drop: float,
                 drop_path: float, aggregation: str, local_enhancement: str, feed_forward: str, **dd):  # fmt: skip
        super().__init__()
        check_variant("feed_forward", feed_forward, FEED_FORWARDS)
        parts = {"aggregation": aggregation, "local_enhancement": local_enhancement}
        self.norm1 = norm_layer(dim)
        self.attn = ShuntedSelfAttention(dim, num_heads, ratios, qkv_bias, qk_scale, attn_drop, drop, **parts, **dd)
        self.norm2 = norm_layer(dim)
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"the feed-forward's width is {mlp_ratio} times {dim} channels, but at least 1 is needed")
        self.mlp = FEED_FORWARDS[feed_forward](dim, int(dim * mlp_ratio), drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, H * W, C) of `size` (H, W) -> the same shape."""
        return self.feed(self.attend(x, size), size)

    def attend(self, x: Tensor, size: Size) -> Tensor:
        return x + self.drop_path(self.attn(self.norm1(x), size))

    def feed(self, x: Tensor, size: Size) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class PatchEmbed(nn.Module):
    """Overlapping patch embedding of the neck (stride 1) and of stages 2 to 4 (stride 2): 3x3 convolution, norm."""

    def __init__(self, cin: int, dim: int, stride: int, **dd):
        super().__init__()
        self.proj = nn.Conv2d(cin, dim, 3, stride, padding=1, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, cin, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / stride) and ceil(W / stride)."""
        x = self.proj(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class StemProjection(nn.Conv2d):
    """The stem's last step: 2x2 patches that do not overlap, H and W padded to even sizes."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / 2), ceil(W / 2))."""
        return self._conv_forward(pad_to_multiple(x, 2), self.weight, self.bias)


class Stem(nn.Module):
    """Patch embedding of stage 1 (Sec. 3.2): 7x7 stride 2, `num_conv` more of 3x3 (by model size), 2x2 stride 2."""

    stride = 4

    def __init__(self, in_chans: int, dim: int, num_conv: int, **dd):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(1 + num_conv):
            kernel, stride, cin = (7, 2, in_chans) if i == 0 else (3, 1, dim)
            layers += [
                nn.Conv2d(cin, dim, kernel, stride, kernel // 2, bias=False, **dd),
                nn.BatchNorm2d(dim, **dd),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*layers, StemProjection(dim, dim, 2, 2, **dd))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, in_chans, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / 4) and ceil(W / 4)."""
        x = self.conv(x)
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


STEMS: dict[str, Any] = {"shunted": Stem}


class Stage(nn.Module):
    """Patch embedding, a block for each rate of `drop_path`, norm: (B, cin, H, W) -> (B, dim, h, w)."""

    def __init__(self, cin: int, patch_embed: nn.Module, dim: int, norm_layer: Callable[..., nn.Module],
                 drop_path: Sequence[float], **block: Any):  # fmt: skip
        super().__init__()
        self.cin = cin
        self.grad_checkpointing = False
        self.layer_scale: nn.Module | None = None  # the neck may have one
        self.patch_embed = patch_embed
        self.block = nn.ModuleList(Block(dim, norm_layer, drop_path=rate, **block) for rate in drop_path)
        self.norm = norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        image = x
        x, size = self.patch_embed(check_channels(x, self.cin).contiguous(memory_format=torch.channels_last))
        for block in self.block:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block.feed, checkpoint(block.attend, x, size), size)  # half a block's maps at a time
            else:
                x = block(x, size)
        out = to_image(self.norm(x), size)
        return out if self.layer_scale is None else self.layer_scale(out) + image


def factory_keywords(device: Any, dtype: Any) -> dict[str, Any]:
    """Keywords for the layers' constructors: only what was given, as not every `norm_layer` knows them."""
    return {key: value for key, value in {"device": device, "dtype": dtype}.items() if value is not None}


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Stochastic depth a block, rising from 0 to `rate`."""
    if depth < 1:
        raise ValueError(f"depth is {depth}, but at least 1 block is needed")
    if not 0 <= rate <= 1:
        raise ValueError(f"drop_path_rate is {rate}, but 0 to 1 is needed")
    return torch.linspace(0, rate, depth, device="cpu").tolist()


def init_weights(module: nn.Module) -> None:
    """Initial weights of the authors' code: truncated normal (Linear), normal by fan-out (Conv2d), norms at 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=(2.0 / fan_out) ** 0.5)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
        return
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        nn.init.zeros_(bias)


class ShuntedTransformer(ReferenceWeightsMixin, Stage):
    """The neck: one stage that keeps channels and size, for the feature path of a detector.

    Weights of the source load by `load_state_dict` as they are. The output is channels_last in memory.

    Args:
        cin: channels in and out.
        depth: number of blocks.
        img_size: not used; the source has it.
        num_heads: heads in all; must divide `cin`, and be divided by the number of ratios.
        mlp_ratios: width of the feed-forward layer over `cin`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the products of queries and keys; head_dim ** -0.5 by default.
        drop_rate: dropout after each projection.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth, rising from 0 at the first block to this rate at the last.
        norm_layer: called with the channels; norms of blocks and output.
        sr_ratios: the source's shorthand for the ratios: 8 is (8, 4), 4 is (4, 2), 2 is (2, 1), 1 plain attention.
            A tuple is taken as `ratios`.
        ratios: r_i of each head group, any number of them; instead of `sr_ratios`.
        aggregation, local_enhancement, feed_forward: parts of its blocks by name, for comparisons; the source's are
            "conv", "before" and "detail", and `shunted_lit.models.ablations` tells the others.
        layer_scale: not in the source. A number returns x + gamma * neck(x), gamma one factor a channel that starts
            at this number (CaiT's LayerScale). With 0 a trained detector keeps its outputs until training moves them:
            the first step trains gamma alone, from the second the whole neck has a gradient. None is the source.

    Shape:
        (B, cin, H, W) -> (B, cin, H, W), any floating dtype, H and W from 1 up. Where a ratio does not divide H or W,
        the keys' and values' map is padded with zeros at the right and bottom; sizes that it divides equal the source.

    Raises:
        ValueError: numbers that do not divide, a ratio below 1; in `forward`, an input of another shape.
    """

    def __init__(self, cin: int = 512, depth: int = 3, img_size: int = 40, num_heads: int = 2, mlp_ratios: float = 4.0,
                 qkv_bias: bool = True, qk_scale: float | None = None, drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 norm_layer: Callable[..., nn.Module] = nn.LayerNorm, sr_ratios: int | Sequence[int] = 2, *,
                 ratios: Sequence[int] | None = None, aggregation: str = "conv", local_enhancement: str = "before",
                 feed_forward: str = "detail", layer_scale: float | None = None,
                 device=None, dtype=None):  # fmt: skip
        dd = factory_keywords(device, dtype)
        parts = {"aggregation": aggregation, "local_enhancement": local_enhancement, "feed_forward": feed_forward}
        ratios = parse_ratios(sr_ratios if ratios is None else ratios)
        block: dict[str, Any] = dict(
            num_heads=num_heads, ratios=ratios, mlp_ratio=mlp_ratios, qkv_bias=qkv_bias, qk_scale=qk_scale
        )
        block.update(drop=drop_rate, attn_drop=attn_drop_rate, **parts)
        rates, embed = drop_path_rates(drop_path_rate, depth), PatchEmbed(cin, cin, stride=1, **dd)
        super().__init__(cin, embed, cin, partial(norm_layer, **dd), rates, **block, **dd)
        self.parts = parts
        if layer_scale is not None:
            self.layer_scale = LayerScale2d(cin, layer_scale, **dd)
        self.apply(init_weights)

    @classmethod
    def from_checkpoint(cls, path: str | PathLike, level: int | None = None, **keywords: Any) -> "ShuntedTransformer":
        """The trained neck out of a checkpoint of `shunted-lit fit`, or of the source, as a plain module in eval mode.

        Args:
            path: a file that `torch.load` reads with `weights_only=True`, or .safetensors.
            level: which neck, where the checkpoint has several; the number it has in `neck_levels`.
            keywords: those of the constructor, over what the checkpoint says. Weights alone, such as the source's,
                do not say `num_heads`, `qk_scale` and `norm_layer`: name them where they differ from the defaults.

        Raises:
            ValueError: no neck in the file, or several and no `level`; weights that do not fit.
        """
        content = read_checkpoint(path)
        weights = from_reference_names(content)
        first = "patch_embed.proj.weight"
        found = {m[2]: m[1] for name in weights if (m := re.match(rf"(|.*\bnecks\.(\d+)\.){first}$", name))}
        if not found:
            raise ValueError(f"{path} holds no neck: none of its {len(weights)} tensors is named [...]{first}")
        key = None if level is None else str(level)
        if key is None and len(found) == 1:
            (key,) = found
        if key not in found:
            raise ValueError(
                f"{path} holds necks on the levels {sorted(found)}, and level is {level}; name one of them"
            )
        weights = {name.removeprefix(found[key]): v for name, v in weights.items() if name.startswith(found[key])}
        known, trained = infer_neck_keywords(weights), content.get("hyper_parameters", {}).get("neck")
        known = known if trained is None else {"cin": known["cin"], **trained}  # only parts of the source are read off
        neck = cls(**{**known, **keywords})
        neck.load_state_dict(weights)
        return neck.eval()

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        try:
            keywords = infer_neck_keywords(weights)
        except KeyError:
            return "They are no neck's"
        return f"They are those of ShuntedTransformer({', '.join(f'{k}={v}' for k, v in keywords.items())})"

    def freeze_patch_embed(self) -> None:
        """Stops training the patch embedding."""
        self.patch_embed.requires_grad_(False)


LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)  # of the backbones' blocks and stages


class ShuntedBackbone(ReferenceWeightsMixin):
    """The four-stage Shunted Transformer (Sec. 3.3, Table 1), with timm's model interface.

    Weights of the authors' repository load by `load_state_dict` as they are.

    Args:
        in_chans: channels of the images.
        num_classes: classes of the head; 0 for none.
        global_pool: "avg", "max" or "avgmax"; "" for none, and the head then judges each place, (B, classes, h, w).
        dims, depths, num_heads, mlp_ratios, ratios: one entry a stage; `ratios` holds a tuple (or the authors'
            `sr_ratio`) for each.
        num_conv: 3x3 convolutions in the stem.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout after each projection.
        attn_drop_rate: dropout on attention weights.
        drop_path_rate: stochastic depth, rising from 0 at the first block to this rate at the last of all stages.
        stem, aggregation, local_enhancement, feed_forward: parts by name, for the paper's comparisons; the authors' are
            "shunted", "conv", "before" and "detail", and `shunted_lit.models.ablations` tells the others.
        norm_layer: norms of blocks and stages.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), H and W from 1 up. Stage i has ceil(H / 2 ** (i + 1)) rows, or a
        quarter of that with the stem "patch16".

    Raises:
        ValueError: entries a stage of unequal number, numbers that do not divide, an unknown pooling; in `forward`,
            an input of another shape.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg",
                 dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (1, 2, 4, 1),
                 num_heads: Sequence[int] = (2, 4, 8, 16), mlp_ratios: Sequence[float] = (8, 8, 4, 4),
                 ratios: Sequence[int | Sequence[int]] = ((8, 4), (4, 2), (2, 1), (1,)), num_conv: int = 0,
                 qkv_bias: bool = True, drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 stem: str = "shunted", aggregation: str = "conv", local_enhancement: str = "before",
                 feed_forward: str = "detail",
                 norm_layer: Callable[..., nn.Module] = LAYER_NORM, device=None, dtype=None):  # fmt: skip
        super().__init__()
        check_variant("stem", stem, STEMS)
        counts = [len(entries) for entries in (dims, depths, num_heads, mlp_ratios, ratios)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"dims, depths, num_heads, mlp_ratios, ratios have {counts} entries; give each one a stage"
            )
        if in_chans < 1 or num_classes < 0 or num_conv < 0:
            raise ValueError(
                f"in_chans is {in_chans}, num_classes {num_classes}, num_conv {num_conv}; 1, 0 and 0 are the least"
            )
        dd = factory_keywords(device, dtype)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.feature_info: list[dict[str, Any]] = []
        drop_path = iter(drop_path_rates(drop_path_rate, sum(depths)))
        stages, reduction = [], 0
        for i, dim in enumerate(dims):
            cin = dims[i - 1] if i else in_chans
            embed = PatchEmbed(cin, dim, stride=2, **dd) if i else STEMS[stem](cin, dim, num_conv, **dd)
            reduction = 2 * reduction if i else STEMS[stem].stride
            block: dict[str, Any] = dict(
                num_heads=num_heads[i], ratios=parse_ratios(ratios[i]), mlp_ratio=mlp_ratios[i]
            )
            block.update(qkv_bias=qkv_bias, qk_scale=None, drop=proj_drop_rate, attn_drop=attn_drop_rate)
            block.update(aggregation=aggregation, local_enhancement=local_enhancement, feed_forward=feed_forward)
            rates = [next(drop_path) for _ in range(depths[i])]
            stages.append(Stage(cin, embed, dim, partial(norm_layer, **dd), rates, **block, **dd))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.num_features = self.head_hidden_size = dims[-1]
        self._check_pool(global_pool)
        self.head = ClassifierHead(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew, as the authors' code does; also after `to_empty` on the meta device."""
        self.apply(init_weights)

    def weights_advice(self, weights: Mapping[str, Any]) -> str:
        shapes = {name: getattr(value, "shape", None) for name, value in weights.items()}
        matches = {}
        for name, options in VARIANTS.items():
            others = ShuntedBackbone(self.in_chans, device="meta", **options).state_dict().items()
            matches[name] = sum(shapes.get(key) == value.shape for key, value in others if not key.startswith("head."))
        nearest = max(matches, key=lambda name: matches[name])
        if not matches[nearest]:
            return "They are no Shunted Transformer's"
        return (
            f"{matches[nearest]} of these {len(shapes)} tensors would fit {nearest}; to leave out a head of other "
            "classes, or to change channels, use pretrained=True, pretrained_cfg_overlay={'file': ...}"
        )

    @staticmethod
    def _check_pool(global_pool: str) -> None:
        if global_pool not in ("avg", "max", "avgmax", ""):
            raise ValueError(f"global_pool is {global_pool!r}; choose 'avg', 'max', 'avgmax' or ''")

    def freeze_patch_embed(self) -> None:
        """Stops training the stem; its BatchNorms still follow the data in train mode."""
        self.stages[0].patch_embed.requires_grad_(False)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups, for layer decay: a group a block, or a group a stage if `coarse`."""
        blocks = [
            (r"^stages\.(\d+)\.patch_embed", (0,)),  # with the first block of its stage
            (r"^stages\.(\d+)\.block\.(\d+)", None),
            (r"^stages\.(\d+)\.norm", (99999,)),  # with the last block of its stage
        ]
        return {"stem": r"^stages\.0\.patch_embed", "blocks": r"^stages\.(\d+)" if coarse else blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes blocks in the backward pass: less memory, more time."""
        for stage in self.stages.children():
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new, untrained head; the pooling stays as it is where `global_pool` is None."""
        self._check_pool(self.head.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        example = next(self.parameters())
        self.head.reset(num_classes, global_pool, device=example.device, dtype=example.dtype)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages that `indices` asks for (timm's meaning), each (B, dim, h, w) and normed, as in the paper.

        Returns the list of maps, after the last map where not `intermediates_only`. `norm` changes nothing.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is {output_fmt!r}; maps come as 'NCHW' only")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for i, stage in enumerate(self.stages):
            if not stop_early or i <= max_index:
                x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last of `indices`, and the head that is useless then, or that is not wanted."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        pruned = max_index + 1 < len(self.stages)
        self.stages = self.stages[: max_index + 1]
        self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, dims[-1], ceil(H / 32), ceil(W / 32)), normed, not pooled."""
        return self.stages(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, dims[-1], h, w) -> (B, num_classes), or (B, dims[-1]) where `pre_logits`; unpooled where not pooled."""
        if pre_logits or self.head.global_pool.pool_type:
            return self.head(x, pre_logits=pre_logits)
        return to_image(self.head.fc(to_tokens(self.head.drop(x))), (x.shape[2], x.shape[3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


VARIANTS: dict[str, dict[str, Any]] = {
    "shunted_t": {"depths": (1, 2, 4, 1), "num_conv": 0},
    "shunted_s": {"depths": (2, 4, 12, 1), "num_conv": 1},
    "shunted_b": {"depths": (3, 4, 24, 2), "num_conv": 2},
}

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "input_size": (3, 224, 224), "pool_size": (7, 7), "fixed_input_size": False, "num_classes": 1000,
            "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stages.0.patch_embed.conv.0", "classifier": "head.fc", "license": "apache-2.0",
        }
        for name in VARIANTS
    }
)  # fmt: skip


def pretrained_filter(checkpoint: Mapping[str, Any], model: ShuntedBackbone) -> dict[str, Any]:
    """Weights by this package's names, for timm to load; it adapts the stem to other channels.

    What else does not fit is told here, since timm is not strict where classes differ; and a head that does fit is
    loaded here, since timm leaves it out where the model has not the classes that its configuration gives the weights.
    """
    weights, config = from_reference_names(checkpoint), cast(dict[str, Any], model.default_cfg)
    stem = f"{config['first_conv']}.weight"
    heads, body = ({k: v for k, v in model.state_dict().items() if k.startswith("head.") is it} for it in (True, False))
    given = {k: body[k] if k == stem else v for k, v in weights.items() if not k.startswith("head.")}
    model.check_weights(given, body)
    if heads and model.num_classes != config["num_classes"]:
        given = {name: value for name, value in weights.items() if name.startswith("head.")}
        if {name: value.shape for name, value in given.items()} == {name: v.shape for name, v in heads.items()}:
            model.load_state_dict(given, strict=False)
        else:
            classes = len(given["head.fc.bias"]) if "head.fc.bias" in given else 0
            counts = f"the weights are for {classes} classes, the model for {model.num_classes}"
            log.info("the head is left out: %s", counts)
    return weights


def create(variant: str, pretrained: bool, **keywords: Any) -> ShuntedBackbone:
    return build_model_with_cfg(
        ShuntedBackbone,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**VARIANTS[variant], **keywords},
    )


@register_model
def shunted_t(pretrained: bool = False, **keywords: Any) -> ShuntedBackbone:
    """Shunted-T: 11.6 M parameters, 2.1 G MACs at 224 x 224."""
    return create("shunted_t", pretrained, **keywords)


@register_model
def shunted_s(pretrained: bool = False, **keywords: Any) -> ShuntedBackbone:
    """Shunted-S: 22.4 M parameters, 4.9 G MACs at 224 x 224."""
    return create("shunted_s", pretrained, **keywords)


@register_model
def shunted_b(pretrained: bool = False, **keywords: Any) -> ShuntedBackbone:
    """Shunted-B: 39.6 M parameters, 8.1 G MACs at 224 x 224."""
    return create("shunted_b", pretrained, **keywords)
