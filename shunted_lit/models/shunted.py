"""Shunted Transformer: the whole architecture, from one group of attention heads to the four-stage backbone.

Paper: Ren, Zhou, He, Feng, Wang, "Shunted Self-Attention via Multi-Scale Token Aggregation", CVPR 2022,
https://arxiv.org/abs/2111.15193. Section and equation numbers below are the paper's.

Read from top to bottom: heads of one granularity -> shunted self-attention -> detail-specific feed-forward -> block ->
patch embedding -> stage -> the neck -> the backbone. Tensor operations and their fast paths are in `ops.py`.

Shapes: tokens are (B, N, C) with N = H * W, and their `size` (H, W) goes with them; images are (B, C, H, W).

Where this departs from the reference implementation (same weights, and equal results wherever the reference keeps all
tokens): maps that a ratio does not divide are padded with zeros at the right and bottom, where the reference drops the
last rows and columns; any tuple of ratios works, where the reference supports four settings; large attention matrices
are not held in memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale2d, calculate_drop_path_rates
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shunted_lit.models import ops
from shunted_lit.models.ops import Size
from shunted_lit.models.timm_registry import TimmBackbone, stage_strides
from shunted_lit.models.weights import NeckWeights, init_weights, parse_ratios
from shunted_lit.utils.checks import check_choice, check_fraction, check_lengths, check_minimum


class PlainHeads(nn.Module):
    """Plain attention heads, which see every token: for `ratios` (1,) alone (stage 4 of Table 1).

    As in the reference implementation, local enhancement is added here to the output of attention, not to the values:
    released weights depend on it. There is no aggregation, so neither a norm nor a GELU.
    """

    ratio: int = 1  # r: one key per r x r tokens

    def __init__(self, dim: int, num_heads: int, head_dim: int, *, qkv_bias: bool, scale: float, attn_drop: float,
                 **dd):  # fmt: skip
        super().__init__()
        self.num_heads, self.scale, self.attn_drop = num_heads, scale, attn_drop
        width = num_heads * head_dim
        self.kv = nn.Linear(dim, 2 * width, bias=qkv_bias, **dd)
        self.local_conv = nn.Conv2d(width, width, 3, padding=1, groups=width, **dd)

    def enhance(self, v: Tensor, size: Size) -> Tensor:
        """Local enhancement LE of Eq. 2: a depthwise 3x3 convolution of (B, n, heads * d)."""
        return ops.to_tokens(self.local_conv(ops.to_image(v, size)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Eq. 3: queries (B, N, heads * d), keys and values (B, n, heads * d) -> (B, N, heads * d)."""
        q, k, v = (ops.split_heads(x, self.num_heads) for x in (q, k, v))
        return ops.merge_heads(ops.attention(q, k, v, self.scale, self.attn_drop if self.training else 0.0))

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        """Queries (B, N, heads * d) and tokens (B, N, C) -> (B, N, heads * d)."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.attend(q, k, v) + self.enhance(v, size)


def patch_convolution(dim: int, ratio: int, **dd: Any) -> nn.Module:
    """Multi-scale token aggregation (Sec. 3.1.1): a convolution over r x r patches that do not overlap."""
    return nn.Conv2d(dim, dim, ratio, ratio, **dd)


class ShuntedHeads(PlainHeads):
    """Attention heads of one granularity (Sec. 3.1.1): r x r tokens are merged before keys and values (Eq. 2)."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, *, ratio: int,
                 aggregation: Callable[..., nn.Module], **options: Any):  # fmt: skip
        super().__init__(dim, num_heads, head_dim, **options)
        dd = {key: options[key] for key in ("device", "dtype") if key in options}
        self.ratio = ratio
        self.sr = aggregation(dim, ratio, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def aggregate(self, x: Tensor, size: Size) -> Tensor:
        """Merge patches: tokens (B, N, C) -> an image (B, C, ceil(H / r), ceil(W / r))."""
        return self.sr(ops.pad_to_multiple(ops.to_image(x, size), self.ratio))

    @ops.recompute_in_backward(width=1)
    def keys_and_values(self, merged: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """Eq. 2 after aggregation: merged tokens (B, n, C) of `size` -> keys and values, each (B, n, heads * d)."""
        k, v = self.kv(F.gelu(self.norm(merged))).chunk(2, dim=-1)
        return k, v + self.enhance(v, size)

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        """Queries (B, N, heads * d) and tokens (B, N, C) -> (B, N, heads * d)."""
        image = self.aggregate(x, size)
        k, v = self.keys_and_values(ops.to_tokens(image), (image.shape[2], image.shape[3]))
        return self.attend(q, k, v)


class ShuntedSelfAttention(nn.Module):
    """Shunted self-attention (Sec. 3.1.1): equal groups of heads, each with keys and values of its own granularity.

    Args:
        dim: channels C.
        num_heads: heads in total; must divide `dim` and be a multiple of the number of ratios.
        ratios: ratio r_i of each head group; (1,) alone is plain attention. The weights follow their order.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the products of queries and keys; head_dim ** -0.5 by default.
        attn_drop: dropout rate of the attention weights.
        proj_drop: dropout rate after the output projection.
        heads: classes of the heads with aggregation and of those without (`ablations.py` has others).
        aggregation: module that merges r x r tokens, called with `dim` and r.
        dd: `device` and `dtype` of the parameters.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or is not a multiple of the number of ratios; a ratio is below 1,
            or a rate outside 0..1.
    """

    def __init__(self, dim: int, num_heads: int, ratios: Sequence[int] = (2, 1), *, qkv_bias: bool = True,
                 qk_scale: float | None = None, attn_drop: float = 0.0, proj_drop: float = 0.0,
                 heads: tuple[type[ShuntedHeads], type[PlainHeads]] = (ShuntedHeads, PlainHeads),
                 aggregation: Callable[..., nn.Module] = patch_convolution, **dd):  # fmt: skip
        super().__init__()
        ratios = parse_ratios(ratios)
        check_fraction(attn_drop=attn_drop)
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"`num_heads` must divide the channels, got {num_heads} heads and {dim} channels.")
        if num_heads % len(ratios):
            raise ValueError(f"`num_heads` must be a multiple of the number of `ratios`, got {num_heads} and {ratios}.")
        self.num_heads = num_heads
        head_dim, group_heads = dim // num_heads, num_heads // len(ratios)
        options = dict(qkv_bias=qkv_bias, scale=qk_scale or head_dim**-0.5, attn_drop=attn_drop, **dd)
        shunted, plain = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **dd)
        self.groups = nn.ModuleList(
            plain(dim, group_heads, head_dim, **options)
            if ratios == (1,)
            else shunted(dim, group_heads, head_dim, ratio=ratio, aggregation=aggregation, **options)
            for ratio in ratios
        )
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, N, C) of `size` (H, W) -> the same shape."""
        q = ops.split_channels(self.q(x), len(self.groups))
        out = torch.cat([group(q[i], x, size) for i, group in enumerate(self.groups)], dim=-1)
        return self.proj_drop(self.proj(out))


class DetailSpecificFeedForward(nn.Module):
    """Feed-forward layer with local detail (Sec. 3.1.2): fc2(GELU(h + depthwise3x3(h))) where h = fc1(x)."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, N, C) of `size` (H, W) -> the same shape."""
        return self.drop(self.add_detail_and_project(self.fc1(x), size))

    @ops.recompute_in_backward(width=4)
    def add_detail_and_project(self, h: Tensor, size: Size) -> Tensor:
        """(B, N, hidden) -> (B, N, C)."""
        h = ops.residual_depthwise_gelu(h, size, self.dwconv.weight, self.dwconv.bias)
        return self.fc2(self.drop(h))


@dataclass(frozen=True)
class BlockConfig:
    """Settings of a transformer block, the same for all blocks of a stage.

    Attributes:
        num_heads, ratios, qkv_bias, qk_scale, attn_drop, heads, aggregation: as in `ShuntedSelfAttention`.
        mlp_ratio: hidden channels of the feed-forward layer, as a multiple of the channels.
        drop: dropout rate after each projection.
        norm_layer: called with the number of channels.
        feed_forward: called with channels, hidden channels and `drop`.
    """

    num_heads: int
    ratios: Sequence[int]
    mlp_ratio: float
    norm_layer: Callable[..., nn.Module]
    qkv_bias: bool = True
    qk_scale: float | None = None
    drop: float = 0.0
    attn_drop: float = 0.0
    heads: tuple[type[ShuntedHeads], type[PlainHeads]] = (ShuntedHeads, PlainHeads)
    aggregation: Callable[..., nn.Module] = patch_convolution
    feed_forward: Callable[..., nn.Module] = DetailSpecificFeedForward


class Block(nn.Module):
    """Transformer block (Sec. 3.1): x + SSA(LN(x)), then x + FFN(LN(x)), each with stochastic depth."""

    def __init__(self, dim: int, config: BlockConfig, drop_path: float, **dd):
        super().__init__()
        hidden = int(dim * config.mlp_ratio)
        if hidden < 1:
            raise ValueError(f"`mlp_ratio` must give at least 1 hidden channel, got {config.mlp_ratio} times {dim}.")
        self.norm1 = config.norm_layer(dim)
        self.attn = ShuntedSelfAttention(
            dim, config.num_heads, config.ratios, qkv_bias=config.qkv_bias, qk_scale=config.qk_scale,
            attn_drop=config.attn_drop, proj_drop=config.drop, heads=config.heads, aggregation=config.aggregation, **dd,
        )  # fmt: skip
        self.norm2 = config.norm_layer(dim)
        self.mlp = config.feed_forward(dim, hidden, config.drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, N, C) of `size` (H, W) -> the same shape."""
        return self.feed_forward(self.attend(x, size), size)

    def attend(self, x: Tensor, size: Size) -> Tensor:
        return x + self.drop_path(self.attn(self.norm1(x), size))

    def feed_forward(self, x: Tensor, size: Size) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class PatchEmbed(nn.Module):
    """Overlapping patch embedding of the neck (stride 1) and of stages 2 to 4 (stride 2): 3x3 convolution and norm."""

    def __init__(self, cin: int, dim: int, stride: int, kernel: int = 3, **dd):
        super().__init__()
        self.proj = nn.Conv2d(cin, dim, kernel, stride, kernel // 2, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, cin, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / stride) and ceil(W / stride)."""
        x = self.proj(x)
        return self.norm(ops.to_tokens(x)), (x.shape[2], x.shape[3])


class PaddedConv2d(nn.Conv2d):
    """Convolution over patches that do not overlap; H and W are padded to a multiple of the patch."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, H, W) -> (B, cout, ceil(H / stride), ceil(W / stride))."""
        return F.conv2d(ops.pad_to_multiple(x, self.stride[0]), self.weight, self.bias, self.stride)


class Stem(nn.Module):
    """Patch embedding of stage 1 (Sec. 3.2): 7x7 of stride 2, `num_conv` of 3x3 (by model size), 2x2 of stride 2."""

    stride = 4

    def __init__(self, in_chans: int, dim: int, num_conv: int, **dd):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(1 + num_conv):
            kernel, stride, cin = (7, 2, in_chans) if i == 0 else (3, 1, dim)
            conv = nn.Conv2d(cin, dim, kernel, stride, kernel // 2, bias=False, **dd)
            layers += [conv, nn.BatchNorm2d(dim, **dd), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers, PaddedConv2d(dim, dim, 2, 2, **dd))
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, in_chans, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / 4) and ceil(W / 4)."""
        x = self.conv(x)
        return self.norm(ops.to_tokens(x)), (x.shape[2], x.shape[3])


class Stage(nn.Module):
    """Patch embedding, one block for each rate of `drop_path`, and a norm: (B, cin, H, W) -> (B, dim, h, w)."""

    def __init__(self, cin: int, dim: int, patch_embed: nn.Module, *, drop_path: Sequence[float], config: BlockConfig,
                 **dd):  # fmt: skip
        super().__init__()
        self.cin = cin
        self.grad_checkpointing = False
        self.patch_embed = patch_embed
        self.block = nn.ModuleList(Block(dim, config, rate, **dd) for rate in drop_path)
        self.norm = config.norm_layer(dim)

    def forward(self, x: Tensor) -> Tensor:
        x, size = self.patch_embed(ops.to_channels_last(ops.check_image(x, self.cin)))
        return ops.to_image(self.transform(x, size), size)

    def transform(self, x: Tensor, size: Size) -> Tensor:
        """Blocks and norm: tokens (B, N, dim) of `size` (H, W) -> the same shape."""
        for block in self.block:
            if self.grad_checkpointing and not torch.jit.is_scripting():  # half a block's activations at a time
                x = checkpoint(block.attend, x, size, use_reentrant=False)  # type: ignore[arg-type]
                x = checkpoint(block.feed_forward, x, size, use_reentrant=False)  # type: ignore[arg-type]
            else:
                x = block(x, size)
        return self.norm(x)


class ShuntedTransformer(NeckWeights, Stage):
    """The neck: a single stage that keeps channels and size, for the feature path of a detector.

    Weights of the reference implementation load by `load_state_dict` as they are.

    Args:
        cin: channels in and out.
        depth: number of blocks.
        img_size: ignored; the reference has it.
        num_heads: heads in total; must divide `cin` and be a multiple of the number of ratios.
        mlp_ratios: hidden channels of the feed-forward layer, as a multiple of `cin`.
        qkv_bias: whether queries, keys and values have a bias.
        qk_scale: factor on the products of queries and keys; head_dim ** -0.5 by default.
        drop_rate: dropout rate after each projection.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth, rising from 0 at the first block to this rate at the last.
        norm_layer: called with the channels; norms of blocks and output, not those of patch embedding and aggregation.
        sr_ratios: the reference's shorthand for `ratios`: 8 is (8, 4), 4 is (4, 2), 2 is (2, 1), 1 plain attention.
        ratios: ratio r_i of each head group, any number of them; replaces `sr_ratios`.
        aggregation, local_enhancement, feed_forward: ablation variants by name (see `ablations.py`); the paper's are
            "conv", "before" and "detail".
        form: "reference", or "light": a 1x1 instead of the 3x3 patch embedding, half of the channels through the
            blocks, and a 1x1 convolution that joins the halves, as in YOLO's C2PSA.
        identity_start: add the input, x + conv(neck(x)), with a 1x1 convolution that starts at zero (ControlNet, Zhang
            et al., arXiv 2302.05543): a trained detector keeps its outputs until training changes them.
        layer_scale: another way to add the input: x + gamma * neck(x), with one factor per channel that starts at this
            number (LayerScale, Touvron et al., arXiv 2103.17239). From 0 it hardly learns; use `identity_start`.
        device, dtype: of the parameters.

    Shape:
        (B, cin, H, W) -> (B, cin, H, W), any floating dtype, H and W from 1 up; channels_last in memory.

    Raises:
        ValueError: `num_heads` does not divide `cin`, or is not a multiple of the number of ratios; a value is out of
            range; in `forward`, an input of another shape.
    """

    def __init__(self, cin: int = 512, depth: int = 3, img_size: int = 40, *, num_heads: int = 2,
                 mlp_ratios: float = 4.0, qkv_bias: bool = True, qk_scale: float | None = None, drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0,
                 norm_layer: Callable[..., nn.Module] = nn.LayerNorm, sr_ratios: int | Sequence[int] = 2,
                 ratios: Sequence[int] | None = None, aggregation: str = "conv", local_enhancement: str = "before",
                 feed_forward: str = "detail", form: str = "reference", identity_start: bool = False,
                 layer_scale: float | None = None, device=None, dtype=None):  # fmt: skip
        from shunted_lit.models import ablations  # here, because it imports this module

        check_minimum(1, depth=depth)
        check_fraction(drop_path_rate=drop_path_rate)
        check_choice("form", form, ("reference", "light"))
        if identity_start and layer_scale is not None:
            raise ValueError(f"`layer_scale` must be None where `identity_start` adds the input, got {layer_scale}.")
        dd = ops.factory_keywords(device, dtype)
        variants = dict(aggregation=aggregation, local_enhancement=local_enhancement, feed_forward=feed_forward)
        config = BlockConfig(
            num_heads, parse_ratios(sr_ratios if ratios is None else ratios), mlp_ratios, partial(norm_layer, **dd),
            qkv_bias=qkv_bias, qk_scale=qk_scale, drop=drop_rate, attn_drop=attn_drop_rate,
            **ablations.block_parts(**variants),
        )  # fmt: skip
        rates: Any = calculate_drop_path_rates(drop_path_rate, depth)
        kernel, dim = (1, cin // 2) if form == "light" else (3, cin)
        super().__init__(cin, dim, PatchEmbed(cin, cin, 1, kernel, **dd), drop_path=rates, config=config, **dd)
        self.variants = {**variants, "form": form}  # stored with the weights
        self.bypass = cin - dim  # channels that skip the blocks
        self.adds_input = identity_start or layer_scale is not None
        self.out_proj = nn.Conv2d(cin, cin, 1, **dd) if identity_start or form == "light" else nn.Identity()
        self.layer_scale = nn.Identity() if layer_scale is None else LayerScale2d(cin, layer_scale, **dd)
        self.apply(init_weights)
        if identity_start:
            nn.init.zeros_(self.out_proj.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        image = ops.check_image(x, self.cin)
        x, size = self.patch_embed(ops.to_channels_last(image))
        if self.bypass:
            x = torch.cat([x[..., : self.bypass], self.transform(x[..., self.bypass :], size)], -1)
        else:
            x = self.transform(x, size)
        out = self.layer_scale(self.out_proj(ops.to_image(x, size)))
        return out + image if self.adds_input else out  # this order keeps channels_last

    def freeze_patch_embed(self) -> None:
        """Stop training the patch embedding."""
        self.patch_embed.requires_grad_(False)


class ShuntedBackbone(TimmBackbone):
    """The four-stage Shunted Transformer (Sec. 3.3, Table 1), with timm's model interface (`TimmBackbone`).

    Weights of the reference implementation load by `load_state_dict` as they are.

    Args:
        in_chans: channels of the images.
        num_classes: classes of the head; 0 for no head.
        global_pool: "avg", "max", "avgmax", or "" for none; without pooling the head gives (B, classes, h, w).
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads and feed-forward ratio of each stage.
        ratios: for each stage, the ratio r_i of each head group, or the reference's `sr_ratio`.
        num_conv: 3x3 convolutions in the stem.
        qkv_bias: whether queries, keys and values have a bias.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after each projection.
        attn_drop_rate: dropout rate of the attention weights.
        drop_path_rate: stochastic depth, rising from 0 at the first block to this rate at the last of all stages.
        stem, aggregation, local_enhancement, feed_forward: ablation variants by name (see `ablations.py`); the paper's
            are "shunted", "conv", "before" and "detail".
        norm_layer: norms of blocks and stages.
        output_stride: 8 or 16: patch embeddings that would exceed it have stride 1 (same weights), for DeepLab and PAN.
        device, dtype: of the parameters.

    Shape:
        (B, in_chans, H, W) -> (B, num_classes), H and W from 1 up. Stage i, from 1, has ceil(H / 2 ** (i + 1)) rows,
        a quarter of that with the stem "patch16".

    Raises:
        ValueError: settings with different numbers of stages, heads that do not divide the channels, values out of
            range; in `forward`, an input of another shape.
    """

    def __init__(self, in_chans: int = 3, num_classes: int = 1000, global_pool: str = "avg", *,
                 dims: Sequence[int] = (64, 128, 256, 512), depths: Sequence[int] = (1, 2, 4, 1),
                 num_heads: Sequence[int] = (2, 4, 8, 16), mlp_ratios: Sequence[float] = (8, 8, 4, 4),
                 ratios: Sequence[int | Sequence[int]] = ((8, 4), (4, 2), (2, 1), (1,)), num_conv: int = 0,
                 qkv_bias: bool = True, drop_rate: float = 0.0, proj_drop_rate: float = 0.0,
                 attn_drop_rate: float = 0.0, drop_path_rate: float = 0.0, stem: str = "shunted",
                 aggregation: str = "conv", local_enhancement: str = "before", feed_forward: str = "detail",
                 norm_layer: Callable[..., nn.Module] = partial(nn.LayerNorm, eps=1e-6),  # noqa: B008 - immutable
                 output_stride: int | None = None, device=None, dtype=None):  # fmt: skip
        from shunted_lit.models import ablations  # here, because it imports this module

        super().__init__()
        check_lengths("stage", dims=dims, depths=depths, num_heads=num_heads, mlp_ratios=mlp_ratios, ratios=ratios)
        check_minimum(1, in_chans=in_chans, depths=min(depths))
        check_minimum(0, num_classes=num_classes, num_conv=num_conv)
        check_fraction(drop_path_rate=drop_path_rate)
        dd = ops.factory_keywords(device, dtype)
        parts = ablations.block_parts(aggregation, local_enhancement, feed_forward)
        stem_class = ablations.stem_class(stem)
        strides = stage_strides(stem_class.stride, len(dims), output_stride)
        rates: Any = calculate_drop_path_rates(drop_path_rate, sum(depths))
        self.in_chans, self.feature_info, stages = in_chans, [], []
        for i, dim in enumerate(dims):
            first, cin = sum(depths[:i]), dims[i - 1] if i else in_chans
            stride = strides[i] // strides[i - 1]  # of the patch embedding after the stem: 2, or 1 if dense
            embed = PatchEmbed(cin, dim, stride, **dd) if i else stem_class(cin, dim, num_conv, **dd)
            config = BlockConfig(
                num_heads[i], parse_ratios(ratios[i]), mlp_ratios[i], partial(norm_layer, **dd),
                qkv_bias=qkv_bias, drop=proj_drop_rate, attn_drop=attn_drop_rate, **parts,
            )  # fmt: skip
            stages.append(Stage(cin, dim, embed, drop_path=rates[first : first + depths[i]], config=config, **dd))
            self.feature_info.append({"num_chs": dim, "reduction": strides[i], "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.set_head(dims[-1], num_classes, global_pool, drop_rate, **dd)
        self.init_weights()

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
