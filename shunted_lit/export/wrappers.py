"""Modules that stand in for operations which exporters cannot follow, or follow for one input size only."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shunted_lit.models import ops
from shunted_lit.models.ops import Size
from shunted_lit.models.shunted import DetailSpecificFeedForward


class NormalizedInput(nn.Module):
    """A network with the normalization of its images in front: images (B, 3, H, W) in 0..1 -> the network's output."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


class DynamicAvgPool2d(nn.Module):
    """`nn.AdaptiveAvgPool2d(count)` as two matrix products, (B, C, H, W) -> (B, C, count, count).

    Exporters fix the bins of the original to the example's height and width.
    """

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return self.bin_weights(x, x.shape[-2]) @ x @ self.bin_weights(x, x.shape[-1]).T

    def bin_weights(self, x: Tensor, size: int) -> Tensor:
        """Return a (count, size) matrix: row i holds the weight of each input row (or column) in the mean of bin i."""
        position, bins = (torch.arange(n, device=x.device) for n in (size, self.count))
        first, last = bins * size // self.count, ((bins + 1) * size + self.count - 1) // self.count
        inside = ((position >= first[:, None]) & (position < last[:, None])).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def replace_adaptive_pooling(network: nn.Module) -> nn.Module:
    """Return a copy of a network with square adaptive average pooling replaced by `DynamicAvgPool2d`."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
                setattr(module, name, DynamicAvgPool2d(child.output_size))
    return network


class FoldedFeedForward(DetailSpecificFeedForward):
    """The feed-forward layer with its residual folded into the depthwise kernels: fc2(GELU(depthwise3x3(h)))."""

    def add_detail_and_project(self, h: Tensor, size: Size) -> Tensor:
        return self.fc2(F.gelu(ops.to_tokens(self.dwconv(ops.to_image(h, size)))))


def fold_residuals(network: nn.Module) -> nn.Module:
    """Return a copy of a network in eval mode whose convolutions all have constant weights.

    The feed-forward layer adds its residual to the kernels as it runs. Exported, that is a sum in front of each
    convolution, which quantizers and converters reject: they expect a constant.
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        for module in network.modules():
            if type(module) is DetailSpecificFeedForward:
                module.dwconv.weight[:, :, 1, 1] += 1
                module.__class__ = FoldedFeedForward
    return network
