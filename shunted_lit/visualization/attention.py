"""What attention looks at from a point: exact weights of each granularity, as numbers and as a picture; their cost."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import normalize, pil_to_tensor, to_dtype

from shunted_lit.data.image_io import read_image
from shunted_lit.models.ablations import HeadsEnhancedAfter, LinearAggregation
from shunted_lit.models.detectors import pad_narrow_image
from shunted_lit.models.feature_path import check_neck_keywords
from shunted_lit.models.ops import Size, split_heads
from shunted_lit.models.shunted import PlainHeads, ShuntedHeads, ShuntedTransformer
from shunted_lit.models.timm_registry import VARIANTS
from shunted_lit.models.weights import read_checkpoint
from shunted_lit.tasks import ClassificationTask, DetectionTask, SegmentationTask
from shunted_lit.utils.files import check_new_file

Point = tuple[float, float]


@dataclass(frozen=True)
class AttentionMap:
    """Attention of one token in the heads of one granularity.

    Attributes:
        name: of the heads in the network, such as stages.2.block.3.attn.groups.0.
        ratio: r: r x r tokens are merged into one key.
        stride: pixels of the network's input from a token to the next.
        token: column and row of the token that asks.
        weights: (B, heads, h, w), float32, of the h x w keys; each head's sum to 1.
    """

    name: str
    ratio: int
    stride: int
    token: tuple[int, int]
    weights: Tensor

    def over_equal(self) -> Tensor:
        """(B, h, w): the heads' mean weights, as multiples of what equal attention to all h x w keys would give."""
        return self.weights.mean(1) * self.weights[0, 0].numel()


def heads_of(model: nn.Module) -> dict[str, PlainHeads]:
    """The groups of heads in a network, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PlainHeads)}


@contextmanager
def record_attention(model: nn.Module, point: Point, size: Size) -> Iterator[list[AttentionMap]]:
    """Inside, each run of `model` adds an `AttentionMap` for each group of heads that it goes through, in order.

    The weights are computed a second time, for one token, from the queries and keys that attention itself gets; outside
    of this block nothing is computed or kept for them.

    Args:
        model: any network with shunted attention in it.
        point: x and y in pixels of its input.
        size: height and width of its input, in pixels.
    """
    groups = heads_of(model)
    maps: list[AttentionMap] = []
    sizes: dict[str, Size] = {}

    def note_size(name: str, heads: nn.Module, inputs: tuple[Tensor, Tensor, Size]) -> None:
        sizes[name] = inputs[2]

    def attend(name: str, heads: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        H, W = sizes[name]
        ratio, stride = heads.ratio, stride_of(size, (H, W))
        column, row = min(int(point[0] // stride), W - 1), min(int(point[1] // stride), H - 1)
        asks = split_heads(q[:, row * W + column, None], heads.num_heads)
        products = (asks @ split_heads(k, heads.num_heads).transpose(-2, -1)).float() * heads.scale
        weights = products.softmax(-1).unflatten(-1, (-(-H // ratio), -(-W // ratio))).squeeze(2)
        maps.append(AttentionMap(name, ratio, stride, (column, row), weights.detach().cpu()))
        return type(heads).attend(heads, q, k, v)

    hooks = [heads.register_forward_pre_hook(partial(note_size, name)) for name, heads in groups.items()]
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
    """Attention from a point in every group of heads of a network.

    Args:
        model: a neck, a backbone, or any network with one in it; it runs in evaluation mode.
        x: its input (B, C, H, W), images or features.
        point: x and y in pixels of that input, from the top left.

    Returns:
        In the order of the network; coarse groups before fine ones, as `ratios` has them.

    Raises:
        ValueError: a point that is not within the input, or a network without shunted attention.
    """
    H, W = x.shape[-2:]
    check_point(point, W, H)
    if not heads_of(model):
        raise ValueError(
            f"{type(model).__name__} has no shunted attention in it: neither a neck nor a shunted backbone"
        )
    training = model.training
    try:
        with record_attention(model.eval(), point, (H, W)) as maps, torch.no_grad():
            model(x)
    finally:
        model.train(training)
    return maps


def stride_of(size: Size, tokens: Size) -> int:
    """Pixels from a token to the next: a power of 2 in every stage, however an odd size was rounded up."""
    return max(2 ** math.ceil(math.log2(pixels / count)) for pixels, count in zip(size, tokens, strict=True))


def check_point(point: Point, width: int, height: int) -> None:
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(f"the point {point[0]:g},{point[1]:g} is not within the image of {width} x {height} pixels")


def most_of(heat: Any) -> str:
    most = float(heat.max())
    return f"{most:.3g}" if most < 1000 else f"{most:.0f}"


def draw_attention(path: Path, image: Tensor, maps: Sequence[AttentionMap], point: Point, scale: float = 1.0) -> None:
    """Writes the image with its point, and beside it a row for each place in the network, a column a granularity.

    Colours have one scale in the whole picture: how many times what each key would get if all got the same. So coarse
    keys, which are few and large, compare with fine ones, and attention to nothing in particular is grey.

    Args:
        path: the picture to write.
        image: (3, H, W) in 0..1.
        maps: of one image; heads of a group are averaged.
        point: x and y in pixels of the image.
        scale: pixels of the network's input for one of the image.

    Raises:
        ValueError: no map.
    """
    if not maps:
        raise ValueError("there is no attention to draw: maps is empty")
    rows: dict[str, list[AttentionMap]] = {}
    for found in maps:
        rows.setdefault(found.name.rpartition(".groups.")[0], []).append(found)
    columns = 1 + max(map(len, rows.values()))
    H, W = image.shape[-2:]
    side, shape = 2.6, min(max(H / W, 0.5), 3.0)  # of a panel; thinner images are stretched to it
    aspect: Any = "equal" if shape == H / W else "auto"
    figure = Figure(figsize=(side * columns, (side * shape + 0.35) * len(rows)), layout="constrained", dpi=120)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    shown = image.detach().cpu().float().clamp(0, 1)
    grey = shown.mean(0)
    most = max(4.0, *(float(found.over_equal()[0].max()) for found in maps))
    half = 2 ** math.ceil(math.log2(most) / 2)  # so that five whole powers of 2 mark the scale
    top = half**2
    scaled = ScalarMappable(LogNorm(1 / top, top, clip=True), "coolwarm")
    for axes in grid.flat:
        axes.set_axis_off()
    for (name, groups), line in zip(rows.items(), grid, strict=True):
        line[0].imshow(shown.permute(1, 2, 0).numpy(), aspect=aspect)
        line[0].plot(*point, "o", color="red", markersize=6, markeredgecolor="white", clip_on=False)
        line[0].set_title(name.removesuffix(".attn"), fontsize=8)
        for axes, found in zip(line[1:], groups, strict=False):
            heat = found.over_equal()[0].numpy()
            cell = found.ratio * found.stride / scale  # pixels of the image a key covers
            axes.imshow(grey.numpy(), cmap="gray", vmin=-0.3, vmax=1.6, aspect=aspect)
            axes.imshow(
                heat, norm=scaled.norm, cmap=scaled.cmap, alpha=0.65, interpolation="nearest", aspect=aspect,
                extent=(-0.5, heat.shape[1] * cell - 0.5, heat.shape[0] * cell - 0.5, -0.5),
            )  # fmt: skip
            axes.plot(*point, "o", color="none", markersize=6, markeredgecolor="white", clip_on=False)
            axes.set_xlim(-0.5, W - 0.5)
            axes.set_ylim(H - 0.5, -0.5)
            heads = found.weights.shape[1]
            keys = " x ".join(map(str, heat.shape))
            told = f"r = {found.ratio}: {heads} head{'s' * (heads > 1)}, {keys} keys, up to {most_of(heat)}x"
            axes.set_title(told, fontsize=8)
    bar = figure.colorbar(scaled, ax=grid, aspect=30, pad=0.01)
    bar.set_label("times equal attention", fontsize=8)
    marks = {f"1/{top}": 1 / top, f"1/{half}": 1 / half, "1": 1, f"{half}": half, f"{top}": top}
    bar.set_ticks(list(marks.values()), labels=list(marks), fontsize=8)
    bar.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


@dataclass(frozen=True)
class AttentionCost:
    """What the heads of one granularity cost for one image.

    Attributes:
        name: of the heads in the network.
        ratio, heads: r, and how many heads.
        queries, keys: tokens that ask, and that are asked.
        flops: multiplications and additions of the aggregation (none where it pools), of the projection to keys and
            values with their local enhancement, and of the two products of attention. Queries and output projection,
            which groups share, are not in it.
    """

    name: str
    ratio: int
    heads: int
    queries: int
    keys: int
    flops: dict[str, int]


def attention_costs(model: nn.Module, x: Tensor) -> list[AttentionCost]:
    """Tokens and FLOPs of every group of heads that an input (1, C, H, W) goes through; "meta" computes nothing."""
    costs: list[AttentionCost] = []

    def note(name: str, heads: Any, inputs: tuple[Tensor, Tensor, Size]) -> None:
        q, tokens, (H, W) = inputs
        ratio, width, dim = heads.ratio, q.shape[-1], tokens.shape[-1]
        keys = -(-H // ratio) * -(-W // ratio)
        weights = sum(p.numel() for p in heads.sr.parameters() if p.ndim > 1) if isinstance(heads, ShuntedHeads) else 0
        if isinstance(getattr(heads, "sr", None), LinearAggregation):  # each channel gets the same ones
            weights *= dim
        enhanced = H * W if isinstance(heads, HeadsEnhancedAfter) else keys if hasattr(heads, "local_conv") else 0
        flops = {
            "aggregation": 2 * keys * weights,
            "projection": 2 * keys * dim * 2 * width + 2 * 9 * enhanced * width,
            "attention": 4 * H * W * keys * width,
        }
        costs.append(AttentionCost(name, ratio, heads.num_heads, H * W, keys, flops))

    hooks = [heads.register_forward_pre_hook(partial(note, name)) for name, heads in heads_of(model).items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return costs


def cost(
    name: str,
    options: dict[str, Any] = {},  # noqa: B006 - read only
    height: int = 40,
    width: int = 40,
) -> None:
    """Show what each granularity costs: tokens, keys and FLOPs of each group of heads.

    Args:
        name: neck, shunted_t, shunted_s or shunted_b.
        options: keywords of the network, such as {"ratios": [8, 4, 2, 1], "num_heads": 4} for the neck.
        height, width: of its input: features for the neck, an image for the others.

    Raises:
        ValueError: an unknown name, keywords that do not fit, a size below 1.
    """
    if name not in ("neck", *VARIANTS):
        raise ValueError(f"{name!r} is none of neck, {', '.join(VARIANTS)}")
    if height < 1 or width < 1:
        raise ValueError(f"height is {height} and width {width}, but 1 is the least")
    if name == "neck":
        check_neck_keywords(options)
    with torch.device("meta"):
        try:
            model: Any = ShuntedTransformer(**options) if name == "neck" else timm.create_model(name, **options)
        except (RuntimeError, TypeError) as error:  # unknown keywords; weights, of which there are none
            raise ValueError(f"options {options} do not fit {name} ({error})") from error
        channels = model.cin if name == "neck" else model.in_chans
        x, counter = torch.empty(1, channels, height, width), FlopCounterMode(display=False)
        with counter, sdpa_kernel(SDPBackend.MATH):
            costs = attention_costs(model.eval(), x)
    parts = list(costs[0].flops)
    heads, whole = sum(sum(row.flops.values()) for row in costs), counter.get_total_flops()
    table = Table(
        title=f"{name}, 1 x {channels} x {height} x {width}: MFLOPs of each granularity",
        caption=f"together {heads / 1e6:.0f} of the network's {whole / 1e6:.0f} MFLOPs",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for head in ("", "r", "heads", "queries", "keys", *parts):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for row in costs:
        numbers = (row.ratio, row.heads, row.queries, row.keys)
        place = row.name.rpartition(".attn.groups.")[0]
        table.add_row(place, *map(str, numbers), *(f"{row.flops[part] / 1e6:.1f}" for part in parts))
    Console().print(table)


@dataclass(frozen=True)
class Prepared:
    """A network that takes an image, the image as it takes it, and how many pixels it has for one of the file's."""

    network: nn.Module
    x: Tensor
    scale: float = 1.0


def prepare(source: str, image: Tensor) -> Prepared:
    """The network of a checkpoint or a name, with an image (3, H, W) in 0..1 as its task would hand it over."""
    if source in VARIANTS and not Path(source).is_file():
        model: Any = timm.create_model(source)
        return Prepared(model, normalized(image, model)[None])
    content = read_checkpoint(source)
    task = content.get("task")
    if task == DetectionTask.__name__:
        detector: Any = (
            DetectionTask.load_from_checkpoint(source, map_location="cpu", weights_only=True).eval().detector
        )
        image = pad_narrow_image(detector, image)
        images, _ = detector.transform([image])
        return Prepared(detector.backbone, images.tensors, images.image_sizes[0][1] / image.shape[2])
    if task == SegmentationTask.__name__:
        segmentation = SegmentationTask.load_from_checkpoint(source, map_location="cpu", weights_only=True)
        return Prepared(segmentation.segmenter, image[None])
    if task == ClassificationTask.__name__:
        model = ClassificationTask.load_from_checkpoint(source, map_location="cpu", weights_only=True).model
        return Prepared(model, normalized(image, model)[None])
    raise ValueError(f"{source} holds no run of shunted-lit fit; other names are {', '.join(VARIANTS)}")


def normalized(image: Tensor, model: Any) -> Tensor:
    return normalize(image, list(model.pretrained_cfg["mean"]), list(model.pretrained_cfg["std"]))


def attention(
    image: Path, ckpt: str = "", point: str = "", out: Path = Path("attention.png"), every_block: bool = False
) -> None:
    """Draw what attention looks at from a point of an image: coarse and fine heads side by side.

    Args:
        image: the image.
        ckpt: checkpoint of `shunted-lit fit`, with the neck or on a shunted backbone; or shunted_t, shunted_s or
            shunted_b by name, with random weights, to see the granularities alone.
        point: x,y in pixels from the top left, such as 120,80.
        out: picture to write; must not exist.
        every_block: a row for every block, not for the last of each stage alone.

    Raises:
        ValueError: a point outside the image, a checkpoint without shunted attention, a file that exists.
    """
    check_new_file(out, ".png")
    if not ckpt:
        raise ValueError(f"name a checkpoint of `shunted-lit fit` by --ckpt, or one of {', '.join(VARIANTS)}")
    try:
        x, y = map(float, point.split(","))
    except ValueError:
        raise ValueError(f"point is {point!r}, but x,y in pixels is needed, such as 120,80") from None
    pixels = to_dtype(pil_to_tensor(read_image(image)), torch.float32, scale=True)
    check_point((x, y), pixels.shape[2], pixels.shape[1])
    prepared = prepare(ckpt, pixels)
    try:
        maps = attention_maps(prepared.network, prepared.x, (x * prepared.scale, y * prepared.scale))
    except ValueError as error:
        raise ValueError(f"{ckpt}: {error}") from None
    if not every_block:
        maps = of_last_blocks(maps)
    draw_attention(out, pixels, maps, (x, y), prepared.scale)
    print(out)


def of_last_blocks(maps: Sequence[AttentionMap]) -> list[AttentionMap]:
    """Those of the last block of each stage or neck."""

    def place(found: AttentionMap) -> tuple[str, str]:
        stage, _, rest = found.name.rpartition("block.")
        return stage, rest.partition(".")[0]

    last = dict(map(place, maps))
    return [found for found in maps if last[place(found)[0]] == place(found)[1]]
