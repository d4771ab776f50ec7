"""Variants that the paper compares its design with (Sec. 4.4), by name.

| keyword | the paper's | others |
| --- | --- | --- |
| `stem`: patch embedding of stage 1 | "shunted" | "patch4", "patch16": 4x4 or ViT's 16x16 patches; "overlap7": 7x7, stride 4 |
| `aggregation`: how r x r tokens become one | "conv" | "linear": one weight per place for all channels; "avg"; "max" |
| `feed_forward` | "detail" | "conventional": fc2(GELU(fc1(x))) |
| `local_enhancement`: depthwise 3x3 convolution | "before": of the values | "after": of attention's output; "none" |

Where a ratio does not divide a map, all aggregations see zeros at its border, as the convolution does.
"""  # noqa: E501 - a table

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from shunted_lit.models import ops
from shunted_lit.models.ops import Size
from shunted_lit.models.shunted import DetailSpecificFeedForward, PlainHeads, ShuntedHeads, Stem, patch_convolution
from shunted_lit.utils.checks import check_choice


class LinearAggregation(nn.Module):
    """Weighted sum of the r x r tokens of a patch, with the same weights for every channel."""

    def __init__(self, dim: int, ratio: int, **dd):
        super().__init__()
        self.ratio = ratio
        self.linear = nn.Linear(ratio * ratio, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of r -> (B, C, H / r, W / r)."""
        H, W = x.shape[2:]
        patches = x.unflatten(3, (W // self.ratio, self.ratio)).unflatten(2, (H // self.ratio, self.ratio))
        return self.linear(patches.transpose(3, 4).flatten(4)).squeeze(4)


class Unenhanced(PlainHeads):
    """Heads without local enhancement of the values."""

    def enhance(self, v: Tensor, size: Size) -> Tensor:
        return v.new_zeros(())


class PlainHeadsWithout(Unenhanced):
    """Plain attention without local enhancement."""

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        del self.local_conv


class HeadsWithout(PlainHeadsWithout, ShuntedHeads):
    """Heads of one granularity without local enhancement."""


class HeadsEnhancedAfter(Unenhanced, ShuntedHeads):
    """Heads of one granularity with local enhancement of attention's output, at the resolution of the queries."""

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        out = super().forward(q, x, size)
        return out + PlainHeads.enhance(self, out, size)


class FeedForward(nn.Module):
    """Conventional feed-forward layer: fc2(GELU(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, N, C) of `size` (H, W) -> the same shape."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class PatchStem(nn.Module):
    """Patch embedding by one convolution and a norm; images are padded at the right and bottom to whole patches."""

    kernel, stride = 4, 4

    def __init__(self, in_chans: int, dim: int, num_conv: int, **dd):
        super().__init__()
        padding = self.kernel // 2 if self.kernel > self.stride else 0
        self.proj = nn.Conv2d(in_chans, dim, self.kernel, self.stride, padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, in_chans, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / stride) and ceil(W / stride)."""
        x = self.proj(ops.pad_to_multiple(x, self.stride))
        return self.norm(ops.to_tokens(x)), (x.shape[2], x.shape[3])


class PatchStem16(PatchStem):
    kernel, stride = 16, 16


class OverlappingStem(PatchStem):
    kernel, stride = 7, 4


# Each name of a keyword's value, and the building block that it stands for.
AGGREGATIONS: Mapping[str, Callable[..., nn.Module]] = {
    "conv": patch_convolution,
    "linear": LinearAggregation,
    "avg": lambda dim, ratio, **_: nn.AvgPool2d(ratio),
    "max": lambda dim, ratio, **_: nn.MaxPool2d(ratio),
}
LOCAL_ENHANCEMENTS: Mapping[str, tuple[type[ShuntedHeads], type[PlainHeads]]] = {
    "before": (ShuntedHeads, PlainHeads),
    "after": (HeadsEnhancedAfter, PlainHeads),
    "none": (HeadsWithout, PlainHeadsWithout),
}
FEED_FORWARDS: Mapping[str, Callable[..., nn.Module]] = {
    "detail": DetailSpecificFeedForward,
    "conventional": FeedForward,
}
STEMS: Mapping[str, Any] = {"shunted": Stem, "patch4": PatchStem, "patch16": PatchStem16, "overlap7": OverlappingStem}


def block_parts(aggregation: str, local_enhancement: str, feed_forward: str) -> dict[str, Any]:
    """Return the fields of `BlockConfig` for these names. Raises ValueError for an unknown one."""
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_choice("local_enhancement", local_enhancement, LOCAL_ENHANCEMENTS)
    check_choice("feed_forward", feed_forward, FEED_FORWARDS)
    return {
        "aggregation": AGGREGATIONS[aggregation],
        "heads": LOCAL_ENHANCEMENTS[local_enhancement],
        "feed_forward": FEED_FORWARDS[feed_forward],
    }


def stem_class(stem: str) -> Any:
    """Return the class of a stem by name. Raises ValueError for an unknown one."""
    check_choice("stem", stem, STEMS)
    return STEMS[stem]
