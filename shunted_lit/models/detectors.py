"""Detectors: a feature path, a feature pyramid, and torchvision's heads."""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from shunted_lit.models.sliced_detection import detect_in_slices
from shunted_lit.utils.checks import check_choice, check_minimum, check_options, check_positive
from shunted_lit.utils.distributed import loss_denominator, world_size
from shunted_lit.utils.slices import Slices

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # of the anchors of RetinaNet and the R-CNNs


class Pyramid(nn.Module):
    """Feature path and feature pyramid (Lin et al., CVPR 2017): the backbone of torchvision's detectors.

    Args:
        body: Feature path.
        out_channels: Channels of every level of the pyramid.
        extra_levels: Coarser levels on top: 0, 1 (max pooling) or 2 (P6 and P7 of RetinaNet, from the last C map).

    Shape:
        (B, 3, H, W) -> {name: (B, out_channels, h, w)}, fine to coarse; `strides` holds the stride of each level.
    """

    EXTRA_BLOCKS: Mapping[int, Callable[[int, int], ExtraFPNBlock | None]] = {
        0: lambda cin, cout: None,
        1: lambda cin, cout: LastLevelMaxPool(),
        2: lambda cin, cout: LastLevelP6P7(cin, cout),
    }

    def __init__(self, body: FeaturePath, out_channels: int = 256, extra_levels: int = 2):
        super().__init__()
        if extra_levels not in self.EXTRA_BLOCKS:
            raise ValueError(f"`extra_levels` must be one of {sorted(self.EXTRA_BLOCKS)}, got {extra_levels}.")
        check_minimum(1, pyramid_channels=out_channels)
        channels = list(body.channels.values())
        self.body = body
        extra_blocks = self.EXTRA_BLOCKS[extra_levels](channels[-1], out_channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks)
        self.out_channels = out_channels
        last = body.levels[-1]
        self.strides = [2**level for level in (*body.levels, *range(last + 1, last + 1 + extra_levels))]

    def forward(self, x: Tensor) -> "OrderedDict[str, Tensor]":
        return self.fpn(self.body(x))


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm for any batch: torch refuses one value per group of one sample, but not of several samples.

    A single value is its own mean, so that the result is the bias. This happens on 1 x 1 maps of narrow pyramids.
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class DistributedFCOSHead(FCOSHead):
    """torchvision's FCOS head for maps of any size, with losses averaged over the foreground locations of all ranks.

    torchvision divides by the locations of one rank. Its heads have no public hook for the divisor, so the loss is
    rescaled here.
    """

    def __init__(self, in_channels: int, num_anchors: int, num_classes: int):
        super().__init__(in_channels, num_anchors, num_classes)
        for layers in (self.classification_head.conv, self.regression_head.conv):
            for i, layer in enumerate(layers):
                if isinstance(layer, nn.GroupNorm):
                    layers[i] = GroupNorm(layer.num_groups, layer.num_channels, layer.eps)

    def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Any:
        losses = super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        if world_size() == 1:
            return losses
        foreground = torch.stack([(indices >= 0).sum() for indices in matched_idxs]).sum()
        factor = foreground.clamp(min=1) / loss_denominator(foreground)
        return {name: loss * factor for name, loss in losses.items()}


def fcos(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> FCOS:
    """Build FCOS (Tian et al., ICCV 2019): one square anchor per location assigns objects to levels by its size."""
    if pyramid.out_channels % 32:
        raise ValueError(f"`pyramid_channels` must be a multiple of 32 for fcos, got {pyramid.out_channels}.")
    sizes = tuple((anchor_scale * stride,) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, ((1.0,),) * len(sizes))
    head = DistributedFCOSHead(pyramid.out_channels, anchors.num_anchors_per_location()[0], num_classes)
    # The radius is in anchor sizes: 1.5 strides at any scale.
    defaults = {"anchor_generator": anchors, "head": head, "center_sampling_radius": 1.5 / anchor_scale}
    return FCOS(pyramid, num_classes, **{**defaults, **keywords})


def retinanet(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> RetinaNet:
    """Build RetinaNet (Lin et al., ICCV 2017): nine anchors per location, from 4 strides up."""
    sizes = tuple(tuple(4 * anchor_scale * stride * 2 ** (i / 3) for i in range(3)) for stride in pyramid.strides)
    anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))
    return RetinaNet(pyramid, num_classes, anchor_generator=anchors, **keywords)


class ZeroBasedRCNN(GeneralizedRCNN):
    """Mixin for torchvision's R-CNNs whose labels start at 0, without torchvision's background class 0.

    Predicted masks have the form of target masks: (n, H, W), bool, instead of probabilities (n, 1, H, W).
    """

    MASK_THRESHOLD = 0.5

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if targets is not None:
            if self.roi_heads.has_mask() and any("masks" not in target for target in targets):
                raise ValueError("mask_rcnn needs targets with masks, got boxes alone; give masks or use faster_rcnn.")
            targets = [{**target, "labels": target["labels"] + 1} for target in targets]
        results: Any = super().forward(images, targets)
        if self.training:
            return results
        for result in results:
            result["labels"] = result["labels"] - 1
            if "masks" in result:
                result["masks"] = result["masks"][:, 0] >= self.MASK_THRESHOLD
        return results


class ZeroBasedFasterRCNN(ZeroBasedRCNN, FasterRCNN):
    """torchvision's Faster R-CNN with labels from 0."""


class ZeroBasedMaskRCNN(ZeroBasedRCNN, MaskRCNN):
    """torchvision's Mask R-CNN with labels from 0."""


def roi_pool(pyramid: Pyramid, size: int, anchor_scale: float) -> MultiScaleRoIAlign:
    """Build a RoIAlign (n, C, size, size) for n regions; the level that a region is pooled from follows the anchors."""
    names = [str(level) for level in pyramid.body.levels]
    return MultiScaleRoIAlign(names, size, sampling_ratio=2, canonical_scale=max(round(224 * anchor_scale), 1))


def rcnn_modules(pyramid: Pyramid, num_classes: int, anchor_scale: float) -> dict[str, Any]:
    """Return the modules of both R-CNNs: three anchors per location, of 8 strides, and the box head.

    The box head is as wide as published over 256 channels of the pyramid, and narrower over fewer.
    """
    width = 4 * pyramid.out_channels
    sizes = tuple((8 * anchor_scale * stride,) for stride in pyramid.strides)
    return {
        "rpn_anchor_generator": AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes)),
        "box_roi_pool": roi_pool(pyramid, 7, anchor_scale),
        "box_head": TwoMLPHead(pyramid.out_channels * 7**2, width),
        "box_predictor": FastRCNNPredictor(width, num_classes + 1),
    }


def faster_rcnn(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> ZeroBasedFasterRCNN:
    """Build Faster R-CNN (Ren et al., NeurIPS 2015) on a feature pyramid (Lin et al., CVPR 2017)."""
    return ZeroBasedFasterRCNN(pyramid, **{**rcnn_modules(pyramid, num_classes, anchor_scale), **keywords})


def mask_rcnn(pyramid: Pyramid, num_classes: int, anchor_scale: float, **keywords: Any) -> ZeroBasedMaskRCNN:
    """Build Mask R-CNN (He et al., ICCV 2017): Faster R-CNN and a mask head of four convolutions."""
    channels = pyramid.out_channels
    mask_modules = {
        "mask_roi_pool": roi_pool(pyramid, 14, anchor_scale),
        "mask_head": MaskRCNNHeads(channels, (channels,) * 4, dilation=1),
        "mask_predictor": MaskRCNNPredictor(channels, channels, num_classes + 1),
    }
    modules = {**rcnn_modules(pyramid, num_classes, anchor_scale), **mask_modules}
    return ZeroBasedMaskRCNN(pyramid, **{**modules, **keywords})


class DetectorEntry(NamedTuple):
    """An entry of `DETECTORS`."""

    base: type[nn.Module]  # torchvision's class; the detector takes its keywords
    build: Callable[..., nn.Module]  # from a pyramid, the number of classes, the scale of the anchors and keywords
    classifiers: Sequence[str]  # layers that depend on the number of classes
    annotation: str = "boxes"  # what the detector learns from


DETECTORS: Mapping[str, DetectorEntry] = {
    "faster_rcnn": DetectorEntry(FasterRCNN, faster_rcnn, ["roi_heads.box_predictor"]),
    "fcos": DetectorEntry(FCOS, fcos, ["head.classification_head.cls_logits"]),
    "mask_rcnn": DetectorEntry(
        MaskRCNN, mask_rcnn, ["roi_heads.box_predictor", "roi_heads.mask_predictor.mask_fcn_logits"], "masks"
    ),
    "retinanet": DetectorEntry(RetinaNet, retinanet, ["head.classification_head.cls_logits"]),
}


def build_detector(
    name: str,
    features: FeaturePath,
    num_classes: int,
    *,
    pyramid_channels: int = 256,
    extra_levels: int = 2,
    anchor_scale: float = 1.0,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    **keywords: Any,
) -> nn.Module:
    """Build a torchvision detector over a feature path.

    Args:
        name: One of `DETECTORS`.
        features: Feature path.
        num_classes: Number of classes; labels start at 0.
        pyramid_channels: `out_channels` of `Pyramid`.
        extra_levels: `extra_levels` of `Pyramid`.
        anchor_scale: Size of the anchors relative to the published one, which suits images from 800 pixels. The sizes
            of objects that a level detects scale with it.
        min_size: Short side that images are scaled to, in pixels; of several, training draws one for each image.
        max_size: Upper bound of the long side, in pixels.
        **keywords: Keywords of torchvision's class, such as `score_thresh` or `detections_per_img`.

    Shape:
        Training: images [(3, H_i, W_i)] in 0..1 and targets [{"boxes": (n, 4), x1 y1 x2 y2 in pixels, "labels": (n,),
        int64}], for mask_rcnn with "masks": (n, H_i, W_i) -> {name: loss}. Evaluation: images -> [{"boxes": (n, 4),
        "labels": (n,), "scores": (n,)}], for mask_rcnn with "masks": (n, H_i, W_i), bool. See also `detect`.

    Raises:
        ValueError: An unknown detector or option, or a setting out of range.
    """
    check_choice("detector", name, DETECTORS)
    check_minimum(1, num_classes=num_classes)
    base, build = DETECTORS[name][:2]
    check_options(name, keywords, inspect.signature(base).parameters)
    check_positive(anchor_scale=anchor_scale)
    pyramid = Pyramid(features, pyramid_channels, extra_levels)
    short_sides = [min_size] if isinstance(min_size, int) else list(min_size)
    if not short_sides or min(short_sides) < 1 or max(short_sides) > max_size:
        raise ValueError(
            f"`min_size` must be between 1 and `max_size` ({max_size}), got {min_size}; lower it or raise `max_size`."
        )
    return build(pyramid, num_classes, anchor_scale, min_size=min_size, max_size=max_size, **keywords)


def max_detections(detector: Any) -> int:
    """Return how many objects a detector reports in an image at most."""
    return getattr(detector, "roi_heads", detector).detections_per_img


def detect(detector: nn.Module, images: Sequence[Tensor], slices: Slices | None = None) -> list[dict[str, Tensor]]:
    """Predict each image independently of the others, by batching only images of equal size.

    torchvision pads a batch to its largest image, and global attention sees the padding: a backbone's maps of a 128 x
    128 image change by up to 14 % when it shares a batch with a 128 x 256 image. In a batch of equal sizes, the padding
    depends only on that size.

    Args:
        detector: Result of `build_detector`, in evaluation mode.
        images: [(3, H_i, W_i)] in 0..1.
        slices: how to cut large images; None for whole images.
    """
    if slices is not None:
        return [detect_in_slices(partial(detect, detector), image, slices) for image in images]
    results: dict[int, dict[str, Tensor]] = {}
    for indices in group_by_size(images):
        H, W = images[indices[0]].shape[-2:]
        padded = [pad_narrow_image(detector, images[i]) for i in indices]
        predictions = detector(padded)
        if padded[0].shape[-2:] != (H, W):
            predictions = [crop_prediction(prediction, H, W) for prediction in predictions]
        results.update(zip(indices, predictions, strict=True))
    return [results[i] for i in range(len(images))]


def pad_narrow_image(detector: nn.Module, image: Tensor) -> Tensor:
    """Pad an image (3, H, W) with black where torchvision would scale its short side to 0 pixels."""
    max_size: Any = detector.transform.max_size  # type: ignore[union-attr]
    H, W = image.shape[-2:]
    shortest = -(-max(H, W) // max_size)
    return F.pad(image, [0, max(shortest - W, 0), 0, max(shortest - H, 0)])


def crop_prediction(prediction: dict[str, Tensor], H: int, W: int) -> dict[str, Tensor]:
    """Crop a prediction to H x W pixels from the top left, and drop the boxes outside."""
    boxes = clip_boxes_to_image(prediction["boxes"], (H, W))
    kept = remove_small_boxes(boxes, 1e-3)
    cropped = {key: value[kept] for key, value in {**prediction, "boxes": boxes}.items()}
    if "masks" in cropped:
        cropped["masks"] = cropped["masks"][..., :H, :W]
    return cropped
