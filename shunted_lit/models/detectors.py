"""Detectors: the feature path, a feature pyramid, and a head of torchvision."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7

from shunted_lit.models.feature_path import FeaturePath, group_by_size
from shunted_lit.utils.distributed import loss_denominator, world_size


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
        if out_channels < 1:
            raise ValueError(f"pyramid_channels is {out_channels}, but 1 or more are needed")
        channels = list(body.channels.values())
        self.body = body
        self.fpn = FeaturePyramidNetwork(channels, out_channels, self.EXTRA[extra_levels](channels[-1], out_channels))
        self.out_channels = out_channels
        last = body.levels[-1]
        self.strides = [2**level for level in (*body.levels, *range(last + 1, last + 1 + extra_levels))]

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        return self.fpn(self.body(x))


class SharedFCOSHead(FCOSHead):
    """torchvision's, with losses over the places of all processes that have an object, not over a process's own."""

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Any:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        if world_size() == 1:
            return losses
        own = torch.stack([(indices >= 0).sum() for indices in matched_idxs]).sum()
        factor = own.clamp(min=1) / loss_denominator(own)
        return {name: loss * factor for name, loss in losses.items()}


def fcos(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> FCOS:
    """FCOS (Tian et al., ICCV 2019): one square a place, of the stride's size, tells which objects are a level's."""
    if pyramid.out_channels % 32:
        raise ValueError(f"pyramid_channels is {pyramid.out_channels}, but fcos needs a multiple of 32")
    sizes = tuple((anchor_scale * stride,) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    keywords = {"center_sampling_radius": 1.5 / anchor_scale, **keywords}  # 1.5 strides, whatever the anchors
    head = SharedFCOSHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes)
    return FCOS(pyramid, num_classes, **{"anchor_generator": anchors, "head": head, **keywords})


def retinanet(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> RetinaNet:
    """RetinaNet (Lin et al., ICCV 2017): nine anchors a place, from 4 strides up."""
    sizes = tuple(tuple(4 * anchor_scale * stride * 2 ** (i / 3) for i in range(3)) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **keywords)


class LabelsFromZero(GeneralizedRCNN):
    """torchvision's R-CNNs count the background as class 0; from outside, labels here run from 0 without it.

    Masks come out as they go in: (n, H, W), bool, where torchvision gives shares (n, 1, H, W).
    """

    MASK_THRESHOLD = 0.5

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        results: Any = super().forward(images, targets)
        if self.training:
            return results
        for result in results:
            result["labels"] = result["labels"] - 1
            if "masks" in result:
                result["masks"] = result["masks"][:, 0] >= self.MASK_THRESHOLD
        return results


class FasterRCNNFromZero(LabelsFromZero, FasterRCNN):
    """torchvision's Faster R-CNN, labels from 0."""


class MaskRCNNFromZero(LabelsFromZero, MaskRCNN):
    """torchvision's Mask R-CNN, labels from 0."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None and any("masks" not in target for target in targets):
            raise ValueError("mask_rcnn learns from masks, but the data give boxes alone; give masks, or faster_rcnn")
        return super().forward(images, targets)


def rcnn_parts(pyramid: Pyramid, num_classes: int, anchor_scale: float) -> dict[str, Any]:
    """What both R-CNNs have: three anchors a place, of 8 strides; regions pooled from the levels of the feature path.

    Heads are as wide as published over 256 channels of the pyramid, and narrower over fewer.
    """
    width = 4 * pyramid.out_channels
    return {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((8 * anchor_scale * stride,) for stride in pyramid.strides),
            ((0.5, 1.0, 2.0),) * len(pyramid.strides),
        ),
        "box_roi_pool": pool(pyramid, 7, anchor_scale),
        "box_head": TwoMLPHead(pyramid.out_channels * 7**2, width),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),
    }


def pool(pyramid: Pyramid, size: int, anchor_scale: float) -> MultiScaleRoIAlign:
    """RoIAlign, (n, C, size, size) for n regions; which level a region is pooled from scales with the anchors."""
    names = [str(level) for level in pyramid.body.levels]
    return MultiScaleRoIAlign(names, size, sampling_ratio=2, canonical_scale=max(round(224 * anchor_scale), 1))


def faster_rcnn(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> FasterRCNNFromZero:
    """Faster R-CNN (Ren et al., NeurIPS 2015) on a pyramid (Lin et al., CVPR 2017)."""
    return FasterRCNNFromZero(pyramid, **{**rcnn_parts(pyramid, num_classes, anchor_scale), **keywords})


def mask_rcnn(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> MaskRCNNFromZero:
    """Mask R-CNN (He et al., ICCV 2017): Faster R-CNN, and four convolutions that draw a mask for each box."""
    channels = pyramid.out_channels
    masks = {
        "mask_roi_pool": pool(pyramid, 14, anchor_scale),
        "mask_head": MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
    }
    return MaskRCNNFromZero(pyramid, **{**rcnn_parts(pyramid, num_classes, anchor_scale), **masks, **keywords})


class Detector(NamedTuple):
    """An entry of `DETECTORS`."""

    kind: type[nn.Module]  # torchvision's class, whose options are the detector's
    build: Callable[..., nn.Module]  # what builds it over a pyramid
    classifiers: Sequence[str]  # its layers that are of a number of classes
    annotation: str = "boxes"  # what it learns from


DETECTORS: Mapping[str, Detector] = {
    "faster_rcnn": Detector(FasterRCNN, faster_rcnn, ["roi_heads.box_predictor"]),
    "fcos": Detector(FCOS, fcos, ["head.classification_head.cls_logits"]),
    "mask_rcnn": Detector(
        MaskRCNN, mask_rcnn, ["roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits"], "masks"
    ),
    "retinanet": Detector(RetinaNet, retinanet, ["head.classification_head.cls_logits"]),
}


def detect(detector: nn.Module, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Predictions for each image, whatever the others are: only images of one size share a batch.

    torchvision pads the images of a batch to the largest, and padding leaks through global attention (a 128 x 128 image
    beside one of 128 x 256 moves the maps of a backbone by up to 14 %). By itself an image is padded to a multiple of
    32, which depends on nothing else.
    """
    results: dict[int, dict[str, Tensor]] = {}
    for indices in group_by_size(images):
        wide = [pad_narrow_image(detector, images[i]) for i in indices]
        found, (H, W) = detector(wide), images[indices[0]].shape[-2:]
        if wide[0].shape[-2:] != (H, W):
            found = [crop_prediction(result, H, W) for result in found]
        results.update(zip(indices, found, strict=True))
    return [results[i] for i in range(len(images))]


def pad_narrow_image(detector: nn.Module, image: Tensor) -> Tensor:
    """An image (3, H, W), or where it is so narrow that torchvision would scale its short side to nothing, with black
    at the right or bottom."""
    longest: Any = detector.transform.max_size  # type: ignore[union-attr]
    H, W = image.shape[-2:]
    least = -(-max(H, W) // longest)
    return F.pad(image, [0, max(least - W, 0), 0, max(least - H, 0)])


def crop_prediction(result: dict[str, Tensor], H: int, W: int) -> dict[str, Tensor]:
    """What of a prediction lies within H x W, from the image's top left."""
    boxes = clip_boxes_to_image(result["boxes"], (H, W))
    kept = remove_small_boxes(boxes, 1e-3)
    result = {key: value[kept] for key, value in {**result, "boxes": boxes}.items()}
    return {**result, "masks": result["masks"][..., :H, :W]} if "masks" in result else result


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
        (n,)}] -> {name: loss}; mask_rcnn takes "masks" (n, H_i, W_i) as well. In evaluation, images -> [{"boxes":
        (n, 4), "labels": (n,), "scores": (n,)}], and "masks" (n, H_i, W_i), bool; see `detect`.

    Raises:
        ValueError: an unknown detector, or less than one class.
    """
    if name not in DETECTORS:
        raise ValueError(f"detector is {name!r}; choose one of {', '.join(sorted(DETECTORS))}")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, but at least 1 is needed")
    kind, build = DETECTORS[name][:2]
    known = inspect.signature(kind).parameters
    if unknown := sorted(set(keywords) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    if anchor_scale <= 0:
        raise ValueError(f"anchor_scale is {anchor_scale}, but more than 0 is needed")
    pyramid = Pyramid(features, pyramid_channels, extra_levels)
    sides = [min_size] if isinstance(min_size, int) else list(min_size)
    if not sides or min(sides) < 1 or max(sides) > max_size:
        raise ValueError(
            f"min_size is {min_size} and max_size {max_size}, but 1 pixel or more is needed, and no short side may be "
            "above the bound of the long one; raise max_size too"
        )
    return build(pyramid, num_classes, anchor_scale, min_size=min_size, max_size=max_size, **keywords)
