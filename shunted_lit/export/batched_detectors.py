"""Trained networks as they leave Python: one batch of images in, tensors out, every size free.

torchvision's detectors take lists and loop over images, which no exporter can follow for a batch of any size. Here the
same weights and the same steps run on whole batches. Images come at the size the network works at; they are not scaled.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms, roi_align

from shunted_lit.models.ops import pad_to_multiple


class Normalized(nn.Module):
    """A network behind the normalization of its images: (B, 3, H, W) in 0..1 -> what the network gives."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


class MeanOfBins(nn.Module):
    """nn.AdaptiveAvgPool2d as two products, (B, C, H, W) -> (B, C, n, n): exporters fix its bins to one size."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return self.bins(x, x.shape[-2]) @ x @ self.bins(x, x.shape[-1]).T

    def bins(self, x: Tensor, size: int) -> Tensor:
        """(count, size): the share of each row, or column, in the mean of each bin."""
        place, number = (torch.arange(n, device=x.device) for n in (size, self.count))
        first, last = number * size // self.count, ((number + 1) * size + self.count - 1) // self.count
        inside = ((place >= first[:, None]) & (place < last[:, None])).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)


def with_free_bins(network: nn.Module) -> nn.Module:
    """A copy whose square adaptive pooling can be exported with free sizes."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.AdaptiveAvgPool2d) and isinstance(child.output_size, int):
                setattr(module, name, MeanOfBins(child.output_size))
    return network


def fcos_scores(head: Mapping[str, Tensor]) -> Tensor:
    """(B, anchors, classes): the geometric mean of class and centredness."""
    return torch.sqrt(torch.sigmoid(head["cls_logits"]) * torch.sigmoid(head["bbox_ctrness"]))


def retinanet_scores(head: Mapping[str, Tensor]) -> Tensor:
    """(B, anchors, classes)."""
    return torch.sigmoid(head["cls_logits"])


SCORES: Mapping[type[nn.Module], Callable[[Mapping[str, Tensor]], Tensor]] = {
    FCOS: fcos_scores,
    RetinaNet: retinanet_scores,
}


class BatchDetector(nn.Module):
    """What one stage and two have in common: images to maps, and maps to anchors."""

    def __init__(self, detector: nn.Module):
        super().__init__()
        transform: Any = detector.transform
        self.normalize = Normalized(nn.Identity(), transform.image_mean, transform.image_std)
        self.detector: Any = detector
        self.stride: int = transform.size_divisible
        self.coarsest: int = max(cast(Any, detector).backbone.strides)
        self.has_masks = False

    def maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images (B, 3, H, W) as the network sees them, and the levels of the pyramid, fine to coarse."""
        x = pad_to_multiple(self.normalize(images), self.stride)
        return x, self.detector.backbone(x)


class OneStageDetector(BatchDetector):
    """torchvision's FCOS or RetinaNet on batches.

    Args:
        detector: a trained one, whose weights are used, not copied.

    Shape:
        (B, 3, H, W) in 0..1 -> boxes (B, n, 4) as x1 y1 x2 y2 in pixels, labels (B, n) from 0, scores (B, n), the best
        first, with n = `count`, the detector's `detections_per_img`; places with a score of 0 are empty.
    """

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.scores = SCORES[type(detector)]
        self.count: int = self.detector.detections_per_img

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        detector = self.detector
        x, maps = self.maps(images)
        head = detector.head(list(maps.values()))
        scores, codes = self.scores(head), head["bbox_regression"]
        anchors = anchors_of(detector.anchor_generator, x, maps)
        sizes = [level.shape[0] for level in anchors]  # not len(), which an exporter would take for a fixed number
        found = []
        for score, code, level in zip(scores.split(sizes, 1), codes.split(sizes, 1), anchors, strict=True):
            score, place, label = best(score, detector.score_thresh, detector.topk_candidates)
            boxes = decode(detector.box_coder, pick(code, place), level[place])
            found.append((clip(boxes, images), label, score))
        boxes, labels, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return suppress(boxes, labels, scores, detector.nms_thresh, self.count)


class TwoStageDetector(BatchDetector):
    """torchvision's Faster R-CNN or Mask R-CNN on batches; the same as `OneStageDetector` from outside.

    Of Mask R-CNN there are masks (B, n, 28, 28) besides, shares in 0..1 over the box of each detection.
    """

    def __init__(self, detector: nn.Module):
        super().__init__(detector)
        self.count: int = self.detector.roi_heads.detections_per_img
        self.has_masks = self.detector.roi_heads.has_mask()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.maps(images)
        proposals, proposed = self.propose(images, x, maps)
        heads = self.detector.roi_heads
        logits, codes = heads.box_predictor(heads.box_head(self.pool(heads.box_roi_pool, maps, proposals)))
        B, n = proposed.shape
        boxes = heads.box_coder.decode_single(codes, proposals.flatten(0, 1)).unflatten(0, (B, n)).unflatten(2, (-1, 4))
        boxes = clip(boxes[:, :, 1:], images)  # the first class is the background
        scores = logits.softmax(-1).unflatten(0, (B, n))[..., 1:]
        scores = torch.where((scores > heads.score_thresh) & large(boxes, 1e-2) & (proposed > 0)[..., None], scores, 0)
        labels = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
        boxes, labels, scores = suppress(
            boxes.flatten(1, 2), labels.flatten(1), scores.flatten(1), heads.nms_thresh, self.count
        )
        if not self.has_masks:
            return boxes, labels, scores
        masks = heads.mask_predictor(heads.mask_head(self.pool(heads.mask_roi_pool, maps, boxes)))
        chosen = (labels.flatten() + 1)[:, None, None, None].expand(-1, 1, *masks.shape[2:])
        masks = masks.gather(1, chosen).sigmoid().squeeze(1).unflatten(0, (B, self.count))
        return boxes, labels, scores, masks

    def propose(self, images: Tensor, x: Tensor, maps: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes (B, n, 4) that may hold something, and how likely (B, n); 0 for none."""
        rpn, found = self.detector.rpn, []
        levels = zip(*rpn.head(list(maps.values())), anchors_of(rpn.anchor_generator, x, maps), strict=True)
        for i, (logits, codes, anchors) in enumerate(levels):
            score, place, _ = best(flatten_level(logits, 1).sigmoid(), 0.0, rpn.pre_nms_top_n())
            boxes = decode(rpn.box_coder, pick(flatten_level(codes, 4), place), anchors[place])
            boxes = clip(boxes, images)
            found.append((boxes, torch.full_like(place, i), torch.where(large(boxes, rpn.min_size), score, 0)))
        boxes, labels, scores = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        boxes, _, scores = suppress(boxes, labels, scores, rpn.nms_thresh, rpn.post_nms_top_n())
        return boxes, scores

    def pool(self, pooler: Any, maps: Mapping[str, Tensor], boxes: Tensor) -> Tensor:
        """(B * n, C, h, w) of boxes (B, n, 4): each from the level that its size asks for (FPN, Eq. 1).

        Every box is pooled from every level, and one is kept: which are of a level would be another number each time.
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


# What runs torchvision's detectors, by their class or the class they are derived from, on batches.
BATCHED: Mapping[type[nn.Module], type[BatchDetector]] = {
    FCOS: OneStageDetector,
    RetinaNet: OneStageDetector,
    FasterRCNN: TwoStageDetector,
}


def batched(detector: nn.Module) -> BatchDetector:
    """A detector of torchvision's, as it is exported.

    Raises:
        ValueError: a detector of another kind.
    """
    for kind, build in BATCHED.items():
        if isinstance(detector, kind):
            return build(detector)
    raise ValueError(f"a {type(detector).__name__} can't be exported; {', '.join(k.__name__ for k in BATCHED)} can")


def anchors_of(generator: Any, x: Tensor, maps: Mapping[str, Tensor]) -> list[Tensor]:
    """(anchors, 4) of each level; strides are rounded down as torchvision does it."""
    generator.set_cell_anchors(x.dtype, x.device)
    grids = [level.shape[-2:] for level in maps.values()]
    return generator.grid_anchors(grids, [[x.shape[-2] // h, x.shape[-1] // w] for h, w in grids])


def flatten_level(x: Tensor, width: int) -> Tensor:
    """What a head says of a level, (B, anchors * width, h, w) -> (B, h * w * anchors, width)."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, width))


def pick(x: Tensor, place: Tensor) -> Tensor:
    """Rows of (B, n, c) at places (B, k) -> (B, k, c)."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))


def decode(coder: Any, codes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (B, k, 4) from what a head says (B, k, 4) of anchors (B, k, 4)."""
    function = coder.decode_single if isinstance(coder, BoxCoder) else coder.decode
    return function(codes.flatten(0, 1), anchors.flatten(0, 1)).reshape(codes.shape)


def large(boxes: Tensor, least: float) -> Tensor:
    """Whether boxes (..., 4) are at least `least` pixels wide and high."""
    return ((boxes[..., 2:] - boxes[..., :2]) >= least).all(-1)


def best(scores: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` best of scores (B, n, classes) above the threshold: score (0 for none), place in n, class."""
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    flat = torch.where(flat > threshold, flat, 0)
    # As many empty ones again, so that there are always enough to choose from.
    flat = torch.cat([flat, flat.new_zeros(flat.shape[0], count)], 1)
    score, index = flat.topk(count)
    index = index.clamp(max=scores.shape[1] * classes - 1)
    return score, index // classes, index % classes


def clip(boxes: Tensor, images: Tensor) -> Tensor:
    """Boxes (..., 4) cut to images (B, 3, H, W)."""
    H, W = images.shape[-2:]
    x, y = boxes[..., 0::2].clamp(0, W), boxes[..., 1::2].clamp(0, H)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), -1)


def suppress(
    boxes: Tensor, labels: Tensor, scores: Tensor, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression of boxes (B, n, 4) within each image and class, then the `count` best of each image."""
    B, n = scores.shape
    # One call for all: classes are moved apart to the right and images downwards, where their boxes can't meet.
    apart = boxes.max() + 1
    image = torch.arange(B, device=boxes.device)[:, None].expand(B, n)
    shift = torch.stack((labels, image), -1).to(boxes.dtype) * apart
    moved, flat = (boxes + torch.cat((shift, shift), -1)).flatten(0, 1), scores.flatten()
    candidates = torch.nonzero(flat > 0)[:, 0]
    kept = candidates[nms(moved[candidates], flat[candidates], threshold)]
    flat = torch.zeros_like(flat).index_put((kept,), flat[kept])
    score, index = flat.view(B, n).topk(count)
    return pick(boxes, index), labels.gather(1, index), score
