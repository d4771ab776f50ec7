"""Attention of a network: the weights from one point at each granularity, their picture, and their cost."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shunted_lit.models.ops import Size, split_heads
from shunted_lit.models.shunted import PlainHeads
from shunted_lit.visualization.plots import make_grid

Point = tuple[float, float]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one token in the heads of one granularity.

    Attributes:
        name: of the head group in the network, such as stages.2.block.3.attn.groups.0.
        ratio: r: r x r tokens are merged into one key.
        stride: pixels of the network's input per token, from which keys are merged.
        token: column and row of the query token; in a neck across levels, of the finest level.
        weights: (B, heads, h, w), float32: the weight of each of the h x w keys; they sum to 1 in each head.
    """

    name: str
    ratio: int
    stride: int
    token: tuple[int, int]
    weights: Tensor

    def over_equal(self) -> Tensor:
        """Return the mean weights of the heads, (B, h, w), relative to equal attention to all keys."""
        return self.weights.mean(1) * self.weights[0, 0].numel()


def attention_of(name: str) -> str:
    """Return the name of the attention layer of a head group, by its name."""
    return name.rpartition(".groups.")[0]


def find_heads(model: nn.Module) -> dict[str, PlainHeads]:
    """Return the head groups of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PlainHeads)}


@contextmanager
def record_attention(model: nn.Module, point: Point, size: Size) -> Iterator[list[AttentionMap]]:
    """Record an `AttentionMap` for each head group that a forward pass of `model` runs, in order.

    The weights of one token are computed a second time from the queries and keys that attention receives. The network
    is unchanged after the block.

    Args:
        model: any network with shunted attention.
        point: x and y in pixels of its input.
        size: height and width of its input in pixels.
    """
    groups = find_heads(model)
    maps: list[AttentionMap] = []
    sizes: dict[str, Size] = {}

    def record_size(name: str, heads: nn.Module, inputs: tuple[Tensor, Tensor, Size]) -> None:
        sizes[name] = inputs[2]

    def attend(name: str, heads: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        H, W = sizes[name]
        ratio, stride = heads.ratio, token_stride(size, (H, W))
        h, w = max(
            sizes[other] for other in sizes if attention_of(other) == attention_of(name)
        )  # queries of the finest level
        query_stride = token_stride(size, (h, w))
        column, row = min(int(point[0] // query_stride), w - 1), min(int(point[1] // query_stride), h - 1)
        query = split_heads(q[:, row * w + column, None], heads.num_heads)
        products = (query @ split_heads(k, heads.num_heads).transpose(-2, -1)).float() * heads.scale
        weights = products.softmax(-1).unflatten(-1, (-(-H // ratio), -(-W // ratio))).squeeze(2)
        maps.append(AttentionMap(name, ratio, stride, (column, row), weights.detach().cpu()))
        return type(heads).attend(heads, q, k, v)

    hooks = [heads.register_forward_pre_hook(partial(record_size, name)) for name, heads in groups.items()]
    for name, heads in groups.items():
        heads.attend = partial(attend, name, heads)  # type: ignore[method-assign, assignment]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()
        for heads in groups.values():
            del heads.attend


def attention_maps(model: nn.Module, x: Tensor, point: Point) -> list[AttentionMap]:
    """Compute the attention from one point in every head group of a network.

    Args:
        model: a neck, a backbone, or any network that contains one; it runs in evaluation mode.
        x: its input (B, C, H, W), images or features.
        point: x and y in pixels of that input, from the top left.

    Returns:
        One map per head group in the order of the network, within a block in the order of `ratios`.

    Raises:
        ValueError: the point is outside the input, or the network has no shunted attention.
    """
    H, W = x.shape[-2:]
    check_point(point, W, H)
    if not find_heads(model):
        raise ValueError(f"`model` must contain a neck or a shunted backbone; {type(model).__name__} does not.")
    was_training = model.training
    try:
        with record_attention(model.eval(), point, (H, W)) as maps, torch.no_grad():
            model(x)
    finally:
        model.train(was_training)
    return maps


def keep_last_blocks(maps: Sequence[AttentionMap]) -> list[AttentionMap]:
    """Select the maps of the last block of each stage or neck."""

    def stage_and_block(attention: AttentionMap) -> tuple[str, str]:
        stage, _, rest = attention.name.rpartition("block.")
        return stage, rest.partition(".")[0]

    last = dict(map(stage_and_block, maps))
    return [attention for attention in maps if stage_and_block(attention) in last.items()]


def token_stride(size: Size, tokens: Size) -> int:
    """Return the pixels per token: a power of 2, also where odd sizes were rounded up."""
    return max(2 ** math.ceil(math.log2(pixels / count)) for pixels, count in zip(size, tokens, strict=True))


def check_point(point: Point, width: int, height: int) -> None:
    """Raise ValueError if a point is outside an image."""
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"`point` must be inside the {width} x {height} pixels, got {point[0]:g},{point[1]:g}.")


def draw_attention(path: Path, image: Tensor, maps: Sequence[AttentionMap], point: Point, scale: float = 1.0) -> None:
    """Save the image with its point, with a row per block and a column per granularity.

    One logarithmic colour scale serves the whole picture: the weight of a key relative to equal attention. So a few
    large coarse keys compare with many fine ones, and uniform attention is grey.

    Args:
        path: the picture to write.
        image: (3, H, W) in 0..1.
        maps: of this image; the heads of a group are averaged.
        point: x and y in pixels of the image.
        scale: pixels of the network's input per pixel of the image.

    Raises:
        ValueError: `maps` is empty.
    """
    if not maps:
        raise ValueError("`maps` must hold at least one attention map, got none.")
    rows: dict[str, list[AttentionMap]] = {}
    for attention in maps:
        rows.setdefault(attention_of(attention.name), []).append(attention)
    columns = 1 + max(map(len, rows.values()))
    H, W = image.shape[-2:]
    side, shape = 2.6, min(max(H / W, 0.5), 3.0)  # inches, and height over width: thin images are stretched
    aspect: Any = "equal" if shape == H / W else "auto"
    figure, grid = make_grid(len(rows), columns, (side * columns, (side * shape + 0.35) * len(rows)))
    shown = image.detach().cpu().float().clamp(0, 1)
    largest = max(4.0, *(float(attention.over_equal()[0].max()) for attention in maps))
    half = 2 ** math.ceil(math.log2(largest) / 2)  # the ends of the scale are half**2: five ticks are powers of 2
    colours = ScalarMappable(LogNorm(1 / half**2, half**2, clip=True), "coolwarm")
    for (name, groups), panels in zip(rows.items(), grid, strict=True):
        panels[0].imshow(shown.permute(1, 2, 0).numpy(), aspect=aspect)
        panels[0].plot(*point, "o", color="red", markersize=6, markeredgecolor="white", clip_on=False)
        panels[0].set_title(name.removesuffix(".attn"), fontsize=8)
        for axes, attention in zip(panels[1:], groups, strict=False):
            heat = attention.over_equal()[0].numpy()
            cell = attention.ratio * attention.stride / scale  # pixels of the image per key
            axes.imshow(shown.mean(0).numpy(), cmap="gray", vmin=-0.3, vmax=1.6, aspect=aspect)
            axes.imshow(
                heat, norm=colours.norm, cmap=colours.cmap, alpha=0.65, interpolation="nearest", aspect=aspect,
                extent=(-0.5, heat.shape[1] * cell - 0.5, heat.shape[0] * cell - 0.5, -0.5),
            )  # fmt: skip
            axes.plot(*point, "o", color="none", markersize=6, markeredgecolor="white", clip_on=False)
            axes.set_xlim(-0.5, W - 0.5)
            axes.set_ylim(H - 0.5, -0.5)
            heads, peak, keys = attention.weights.shape[1], float(heat.max()), " x ".join(map(str, heat.shape))
            maximum = f"{peak:.3g}" if peak < 1000 else f"{peak:.0f}"
            title = f"r = {attention.ratio}: {heads} head{'s' * (heads > 1)}, {keys} keys, up to {maximum}x"
            axes.set_title(title, fontsize=8)
    bar = figure.colorbar(colours, ax=grid, aspect=30, pad=0.01)
    bar.set_label("times equal attention", fontsize=8)
    ticks = {f"1/{half**2}": 1 / half**2, f"1/{half}": 1 / half, "1": 1, f"{half}": half, f"{half**2}": half**2}
    bar.set_ticks(list(ticks.values()), labels=list(ticks), fontsize=8)
    bar.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@dataclass(frozen=True)
class AttentionCost:
    """The cost of the heads of one granularity for one image.

    Attributes:
        name: of the head group in the network.
        ratio: r: r x r tokens are merged into one key.
        heads: number of heads.
        queries: number of query tokens.
        keys: number of keys.
        flops: multiplications and additions of the "aggregation", of the "projection" to keys and values with local
            enhancement, and of the two products of "attention". The projections of queries and outputs, which head
            groups share, are not included.
    """

    name: str
    ratio: int
    heads: int
    queries: int
    keys: int
    flops: dict[str, int]


def attention_costs(model: nn.Module, x: Tensor | list[Tensor]) -> list[AttentionCost]:
    """Count tokens and FLOPs of every head group for an input (1, C, H, W), which may be on the "meta" device.

    A neck across levels takes a list of maps.
    """
    calls: dict[str, tuple[Any, Tensor, Size]] = {}

    def record_call(name: str, heads: nn.Module, inputs: tuple[Tensor, Tensor, Size]) -> None:
        calls[name] = heads, inputs[0], inputs[2]

    hooks = [heads.register_forward_pre_hook(partial(record_call, name)) for name, heads in find_heads(model).items()]
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted on CPUs
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    costs = []
    for name, (heads, q, (H, W)) in calls.items():
        keys = -(-H // heads.ratio) * -(-W // heads.ratio)
        module = f"{type(model).__name__}.{name}"
        queries = q.shape[1]
        aggregation, attention = flops.get(f"{module}.sr", 0), 4 * queries * keys * q.shape[-1]
        projection = flops[module] - aggregation - attention
        parts = {"aggregation": aggregation, "projection": projection, "attention": attention}
        costs.append(AttentionCost(name, heads.ratio, heads.num_heads, queries, keys, parts))
    return costs
