"""What the paper compares its parts with (Sec. 4.4), by name; importing this package makes the names known.

| keyword | the paper's | others |
| --- | --- | --- |
| `stem`: patch embedding of stage 1 | "shunted" | "patch4", "patch16": 4 x 4 or ViT's 16 x 16 patches that do not overlap; "overlap7": 7x7, stride 4 |
| `aggregation`: how r x r tokens become one | "conv" | "linear": one weight a place of the patch, for all channels; "avg", "max" |
| `feed_forward` | "detail" | "conventional": fc2(GELU(fc1(x))) |
| `local_enhancement`: depthwise 3x3 convolution | "before" attention, of its values | "after": of what it returns; "none" |

Where a ratio does not divide a map, all aggregations see zeros at its border, as the convolution does.
"""  # noqa: E501 - a table

import torch.nn.functional as F
from torch import Tensor, nn

from shunted_lit.models.shunted import (
    AGGREGATIONS,
    FEED_FORWARDS,
    LOCAL_ENHANCEMENTS,
    STEMS,
    PlainHeads,
    ShuntedHeads,
    Size,
    pad_to_multiple,
    to_tokens,
)


class LinearAggregation(nn.Module):
    """A weighted sum of the r x r tokens of a patch, the same weights for every channel."""

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
    """Heads whose values do not meet their neighbours."""

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
    """Heads of one granularity, and the depthwise convolution of what they return, at the resolution of the queries."""

    def forward(self, q: Tensor, x: Tensor, size: Size) -> Tensor:
        out = super().forward(q, x, size)
        return out + PlainHeads.enhance(self, out, size)


class FeedForward(nn.Module):
    """The conventional one: fc2(GELU(fc1(x)))."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, **dd):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, size: Size) -> Tensor:
        """Tokens (B, H * W, C) of `size` (H, W) -> the same shape."""
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class PatchStem(nn.Module):
    """Patch embedding by one convolution and a norm; images are padded at the right and bottom, so that none is cut."""

    kernel, stride = 4, 4

    def __init__(self, in_chans: int, dim: int, num_conv: int, **dd):
        super().__init__()
        padding = self.kernel // 2 if self.kernel > self.stride else 0
        self.proj = nn.Conv2d(in_chans, dim, self.kernel, self.stride, padding, **dd)
        self.norm = nn.LayerNorm(dim, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Size]:
        """(B, in_chans, H, W) -> tokens (B, h * w, dim) and their size, ceil(H / stride) and ceil(W / stride)."""
        x = self.proj(pad_to_multiple(x, self.stride))
        return self.norm(to_tokens(x)), (x.shape[2], x.shape[3])


class PatchStem16(PatchStem):
    kernel, stride = 16, 16


class OverlappingStem(PatchStem):
    kernel, stride = 7, 4


AGGREGATIONS.update(
    linear=LinearAggregation,
    avg=lambda dim, ratio, **_: nn.AvgPool2d(ratio),
    max=lambda dim, ratio, **_: nn.MaxPool2d(ratio),
)
LOCAL_ENHANCEMENTS.update(after=(HeadsEnhancedAfter, PlainHeads), none=(HeadsWithout, PlainHeadsWithout))
FEED_FORWARDS.update(conventional=FeedForward)
STEMS.update(patch4=PatchStem, patch16=PatchStem16, overlap7=OverlappingStem)
