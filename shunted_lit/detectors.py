"""Detectors: the feature path, a feature pyramid, and a head of torchvision."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from shunted_lit.features import FeaturePath


class Pyramid(nn.Module):
    """Feature path and top-down pyramid (Lin et al., CVPR 2017): what torchvision's detectors call a backbone.

    Args:
        body: the feature path.
        out_channels: channels of every level of the pyramid.
        extra_levels: coarser levels on top: 0, 1 (a pooled one) or 2 (P6 and P7 of RetinaNet, from the last C map).

    Shape:
        (B, 3, H, W) -> {name: (B, out_channels, h, w)}, fine to coarse; `strides` has the stride of each.
    """

    EXTRA: Mapping[int, Callable[[int, int], ExtraFPNBlock | None]] = {
        0: lambda cin, cout: None,
        1: lambda cin, cout: LastLevelMaxPool(),
        2: lambda cin, cout: LastLevelP6P7(cin, cout),
    }

    def __init__(self, body: FeaturePath, out_channels: int = 256, extra_levels: int = 2):
        super().__init__()
        if extra_levels not in self.EXTRA:
            raise ValueError(f"extra_levels is {extra_levels}; choose one of {sorted(self.EXTRA)}")
        channels = list(body.channels.values())
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, out_channels, self.EXTRA[extra_levels](channels[-1], out_channels))
        self.out_channels = out_channels
        last = body.levels[-1]
        self.strides = [2**level for level in (*body.levels, *range(last + 1, last + 1 + extra_levels))]

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        return self.fpn(self.body(x))


def fcos(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> FCOS:
    """FCOS (Tian et al., ICCV 2019): one square a place, of the stride's size, tells which objects are a level's."""
    sizes = tuple((anchor_scale * stride,) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    keywords = {"center_sampling_radius": 1.5 / anchor_scale, **keywords}  # 1.5 strides, whatever the anchors
    return FCOS(pyramid, num_classes, anchor_generator=anchors, **keywords)


def retinanet(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> RetinaNet:
    """RetinaNet (Lin et al., ICCV 2017): nine anchors a place, from 4 strides up."""
    sizes = tuple(tuple(4 * anchor_scale * stride * 2 ** (i / 3) for i in range(3)) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **keywords)


# By name: torchvision's class, whose options are the detector's, and what builds it over a pyramid.
DETECTORS: Mapping[str, tuple[type[nn.Module], Callable[..., nn.Module]]] = {
    "fcos": (FCOS, fcos),
    "retinanet": (RetinaNet, retinanet),
}


def build_detector(
    name: str,
    features: FeaturePath,
    num_classes: int,
    pyramid_channels: int = 256,
    extra_levels: int = 2,
    anchor_scale: float = 1.0,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **keywords: Any,
) -> nn.Module:
    """A torchvision detector over a feature path.

    Args:
        name: one of `DETECTORS`.
        features: the feature path.
        num_classes: number of classes; labels run from 0.
        pyramid_channels, extra_levels: as in `Pyramid`.
        anchor_scale: size of the anchors over the published one, which suits images of 800 pixels and more; objects
            of a level shrink with it.
        min_size, max_size: images are scaled so that the short side is `min_size`, but the long one no more than
            `max_size`; of several `min_size`, training draws one an image.
        keywords: of torchvision's class, such as `score_thresh` or `detections_per_img`.

    Shape:
        In training, images [(3, H_i, W_i)] in 0..1 and targets [{"boxes": (n, 4) as x1 y1 x2 y2 in pixels, "labels":
        (n,)}] -> {name: loss}. In evaluation, images -> [{"boxes": (n, 4), "labels": (n,), "scores": (n,)}].

    Raises:
        ValueError: an unknown detector, or less than one class.
    """
    if name not in DETECTORS:
        raise ValueError(f"detector is {name!r}; choose one of {', '.join(sorted(DETECTORS))}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, but at least 1 is needed")
    kind, build = DETECTORS[name]
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(keywords) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if anchor_scale <= 0:
        raise ValueError(f"anchor_scale is {anchor_scale}, but more than 0 is needed")
    pyramid = Pyramid(features, pyramid_channels, extra_levels)
    return build(pyramid, num_classes, anchor_scale, min_size=min_size, max_size=max_size, **keywords)
