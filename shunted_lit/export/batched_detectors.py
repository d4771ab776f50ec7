"""torchvision's detectors on batches of tensors, so that they can be exported with dynamic sizes.

torchvision's own detectors take lists and loop over images, which no exporter can follow for a variable batch size. The
classes here run the same steps with the same weights on whole batches. Images are taken at their own size: they are not
rescaled.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.ops import nms, roi_align

from shunted_lit.export.wrappers import NormalizedInput
from shunted_lit.models.detectors import max_detections
from shunted_lit.models.ops import pad_to_multiple


class BatchedDetector(nn.Module):
    """The steps that one-stage and two-stage detectors share: normalize images, compute feature maps.

    Args:
        detector: a trained detector of torchvision; its weights are shared, not copied.

    Shape:
        Images (B, 3, H, W) in 0..1 -> boxes (B, n, 4) as x1 y1 x2 y2 in pixels, labels (B, n) from 0 and scores (B, n),
        best first. n is `count`, the detector's `detections_per_img`; unused places have score 0.
    """

    has_masks = False

    def __init__(self, detector: Any):
        super().__init__()
        transform = detector.transform
        self.normalize = NormalizedInput(nn.Identity(), transform.image_mean, transform.image_std)
        self.detector = detector
        self.count = max_detections(detector)
        self.padding_multiple: int = transform.size_divisible
        self.coarsest_stride: int = max(detector.backbone.strides)

    def extract_features(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the normalized, padded images and the levels of the feature pyramid, fine to coarse."""
        x = pad_to_multiple(self.normalize(images), self.padding_multiple)
        return x, self.detector.backbone(x)


# Scores (B, anchors, classes) from a head's outputs; FCOS takes the geometric mean of class and centerness.
ONE_STAGE_SCORES: Mapping[type[nn.Module], Callable[[Mapping[str, Tensor]], Tensor]] = {
    FCOS: lambda head: torch.sqrt(torch.sigmoid(head["cls_logits"]) * torch.sigmoid(head["bbox_ctrness"])),
    RetinaNet: lambda head: torch.sigmoid(head["cls_logits"]),
}


class OneStageDetector(BatchedDetector):
    """FCOS or RetinaNet on batches."""

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.compute_scores = ONE_STAGE_SCORES[type(detector)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector = self.detector
        x, maps = self.extract_features(images)
        head = detector.head(list(maps.values()))
        all_scores, all_codes = self.compute_scores(head), head["bbox_regression"]
        anchors = anchors_per_level(detector.anchor_generator, x, maps)
        sizes = [level.shape[0] for level in anchors]  # len() would become a constant in the exported program
        levels = []
        for scores, codes, level in zip(all_scores.split(sizes, 1), all_codes.split(sizes, 1), anchors, strict=True):
            scores, index, labels = top_candidates(scores, detector.score_thresh, detector.topk_candidates)
            boxes = decode_boxes(detector.box_coder, gather_rows(codes, index), level[index])
            levels.append((clip_boxes(boxes, images), labels, scores))
        boxes, labels, scores = (torch.cat(values, 1) for values in zip(*levels, strict=True))
        return suppress_overlaps(boxes, labels, scores, detector.nms_thresh, self.count)


class TwoStageDetector(BatchedDetector):
    """Faster R-CNN or Mask R-CNN on batches.

    Mask R-CNN also returns masks (B, n, 28, 28): probabilities in 0..1 on a grid over the box of each detection.
    """

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.has_masks = self.detector.roi_heads.has_mask()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.extract_features(images)
        proposals, objectness = self.propose(images, x, maps)
        heads = self.detector.roi_heads
        logits, codes = heads.box_predictor(heads.box_head(self.pool_regions(heads.box_roi_pool, maps, proposals)))
        B, n = objectness.shape
        boxes = heads.box_coder.decode_single(codes, proposals.flatten(0, 1)).unflatten(0, (B, n)).unflatten(2, (-1, 4))
        boxes = clip_boxes(boxes[:, :, 1:], images)  # the first class is the background
        scores = logits.softmax(-1).unflatten(0, (B, n))[..., 1:]
        valid = (scores > heads.score_thresh) & has_min_size(boxes, 1e-2) & (objectness > 0)[..., None]
        labels = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        scores = torch.where(valid, scores, 0)
        boxes, labels, scores = suppress_overlaps(
            boxes.flatten(1, 2), labels.flatten(1), scores.flatten(1), heads.nms_thresh, self.count
        )
        if not self.has_masks:
            return boxes, labels, scores
        masks = heads.mask_predictor(heads.mask_head(self.pool_regions(heads.mask_roi_pool, maps, boxes)))
        channel = (labels.flatten() + 1)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        masks = masks.gather(1, channel).sigmoid().squeeze(1).unflatten(0, (B, self.count))
        return boxes, labels, scores, masks

    def propose(self, images: Tensor, x: Tensor, maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the proposals of the first stage: boxes (B, n, 4) and objectness (B, n), 0 in unused places."""
        rpn, levels = self.detector.rpn, []
        outputs = zip(*rpn.head(list(maps.values())), anchors_per_level(rpn.anchor_generator, x, maps), strict=True)
        for i, (logits, codes, anchors) in enumerate(outputs):
            scores, index, _ = top_candidates(flatten_level(logits, 1).sigmoid(), 0.0, rpn.pre_nms_top_n())
            boxes = decode_boxes(rpn.box_coder, gather_rows(flatten_level(codes, 4), index), anchors[index])
            boxes = clip_boxes(boxes, images)
            scores = torch.where(has_min_size(boxes, rpn.min_size), scores, 0)
            levels.append((boxes, torch.full_like(index, i), scores))
        boxes, level, scores = (torch.cat(values, 1) for values in zip(*levels, strict=True))
        boxes, _, scores = suppress_overlaps(boxes, level, scores, rpn.nms_thresh, rpn.post_nms_top_n())
        return boxes, scores

    def pool_regions(self, pooler: Any, maps: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        """Pool each box of (B, n, 4) from the pyramid level that fits its size (FPN, Eq. 1) -> (B * n, C, h, w).

        Every box is pooled from every level and one result is kept: the number of boxes per level would vary.
        """
        B, n = boxes.shape[:2]
        image = torch.arange(B, device=boxes.device)[:, None].expand(B, n)
        regions = torch.cat((image[..., None].to(boxes.dtype), boxes), -1).flatten(0, 1)
        strides = dict(zip(maps, self.detector.backbone.strides, strict=True))
        names = list(pooler.featmap_names)
        finest, coarsest = (math.log2(strides[name]) for name in (names[0], names[-1]))
        side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])).sqrt().flatten()
        level = torch.floor(pooler.canonical_level + torch.log2(side / pooler.canonical_scale) + 1e-6)
        level = level.clamp(finest, coarsest)
        pooled = [
            torch.where(
                (level == math.log2(strides[name]))[:, None, None, None],
                roi_align(maps[name], regions, pooler.output_size, 1 / strides[name], pooler.sampling_ratio),
                0,
            )
            for name in names
        ]
        return torch.stack(pooled).sum(0)


# The batched version of each torchvision class, also for subclasses.
BATCHED: Mapping[type[nn.Module], type[BatchedDetector]] = {
    FCOS: OneStageDetector,
    RetinaNet: OneStageDetector,
    FasterRCNN: TwoStageDetector,
}


def batch_detector(detector: nn.Module) -> BatchedDetector:
    """Return the batched version of a torchvision detector.

    Raises:
        ValueError: the detector is of an unsupported class.
    """
    for kind, build in BATCHED.items():
        if isinstance(detector, kind):
            return build(detector)
    supported = ", ".join(kind.__name__ for kind in BATCHED)
    raise ValueError(f"Detectors that can be exported are {supported}, got {type(detector).__name__}.")


def anchors_per_level(generator: Any, x: Tensor, maps: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the anchors (n, 4) of each level; strides are rounded down as in torchvision."""
    generator.set_cell_anchors(x.dtype, x.device)
    grids = [level.shape[-2:] for level in maps.values()]
    return generator.grid_anchors(grids, [[x.shape[-2] // h, x.shape[-1] // w] for h, w in grids])


def flatten_level(x: Tensor, width: int) -> Tensor:
    """Reshape the output of a head for one level, (B, anchors * width, h, w) -> (B, h * w * anchors, width)."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Select rows of (B, n, c) by an index (B, k) -> (B, k, c)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def decode_boxes(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Turn regression outputs (B, k, 4) and their anchors (B, k, 4) into boxes (B, k, 4)."""
    decode = getattr(coder, "decode_single", coder.decode)  # FCOS's coder has `decode` alone, for tensors
    return decode(codes.flatten(0, 1), anchors.flatten(0, 1)).reshape(codes.shape)


def has_min_size(boxes: Tensor, minimum: float) -> Tensor:
    """Return which boxes (..., 4) are at least `minimum` pixels wide and high."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= minimum).all(-1)


def top_candidates(scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `count` best of scores (B, n, classes) above a threshold.

    Returns:
        Scores (0 in unused places), indices into n, and classes, each (B, count).
    """
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    flat = torch.where(flat > threshold, flat, 0)
    flat = torch.cat([flat, flat.new_zeros(flat.shape[0], count)], 1)  # topk needs at least `count` entries
    values, index = flat.topk(count)
    index = index.clamp(max=scores.shape[1] * classes - 1)
    return values, index // classes, index % classes


def clip_boxes(boxes: Tensor, images: Tensor) -> Tensor:
    """Clip boxes (..., 4) to the images (B, 3, H, W)."""
    H, W = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, W), boxes[..., 1::2].clamp(0, H)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def suppress_overlaps(
    boxes: Tensor, labels: Tensor, scores: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply non-maximum suppression per image and class to boxes (B, n, 4), then keep the `count` best per image."""
    B, n = scores.shape
    # One call for all: boxes of other classes are shifted right, those of other images down, so that they cannot meet.
    extent = boxes.max() + 1
    image = torch.arange(B, device=boxes.device)[:, None].expand(B, n)
    shift = torch.stack((labels, image), -1).to(boxes.dtype) * extent
    shifted, flat = (boxes + torch.cat((shift, shift), -1)).flatten(0, 1), scores.flatten()
    candidates = torch.nonzero(flat > 0)[:, 0]
    kept = candidates[nms(shifted[candidates], flat[candidates], threshold)]
    flat = torch.zeros_like(flat).index_put((kept,), flat[kept])
    values, index = flat.view(B, n).topk(count)
    return gather_rows(boxes, index), labels.gather(1, index), values
