"""Prediction on slices of large images: each window is predicted alone, and what lies on a seam is found once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import box_area

from shunted_lit.utils.slices import Slices, Window

Prediction = dict[str, Tensor]
SAME = 0.5  # overlap above which two boxes of different windows are one object


def detect_in_slices(detect: Callable[[Sequence[Tensor]], list[Prediction]], image: Tensor, slices: Slices,
                     ) -> Prediction:  # fmt: skip
    """Predict the windows of an image, and join their predictions.

    Args:
        detect: function of images (3, H_i, W_i) that returns their predictions: `boxes` (n, 4) as x1 y1 x2 y2 in
            pixels, `labels` (n,), `scores` (n,), and perhaps `masks` (n, H_i, W_i).
        image: (3, H, W).
        slices: how to cut it. An image of one window is predicted as without slices.

    Returns:
        The prediction of the image, by falling scores.
    """
    H, W = image.shape[-2:]
    windows = slices.windows(H, W)
    if len(windows) == 1:
        return detect([image])[0]
    predictions = []
    for window in windows:
        x1, y1, x2, y2 = window
        predictions.append(move(detect([image[:, y1:y2, x1:x2]])[0], window, H, W))
    joined = {key: torch.cat([prediction[key] for prediction in predictions]) for key in predictions[0]}
    source = torch.cat([x.new_full((len(x),), i) for i, x in enumerate(p["labels"] for p in predictions)])
    cut = torch.cat([is_cut(p["boxes"], window, H, W) for p, window in zip(predictions, windows, strict=True)])
    kept = find_distinct(joined, source, cut)
    return {key: value[kept] for key, value in joined.items()}


def move(prediction: Prediction, window: Window, height: int, width: int) -> Prediction:
    """Return a window's prediction in the pixels of the image."""
    x1, y1, x2, y2 = window
    moved = dict(prediction, boxes=prediction["boxes"] + prediction["boxes"].new_tensor([x1, y1, x1, y1]))
    if "masks" in prediction:
        masks = prediction["masks"]
        moved["masks"] = masks.new_zeros(len(masks), height, width)
        moved["masks"][:, y1:y2, x1:x2] = masks
    return moved


def is_cut(boxes: Tensor, window: Window, height: int, width: int) -> Tensor:
    """Return for each box whether it touches a side of its window that lies inside the image."""
    x1, y1, x2, y2 = window
    inside = boxes.new_tensor([x1 > 0, y1 > 0, x2 < width, y2 < height])
    return (((boxes - boxes.new_tensor(window)).abs() < 1) & inside.bool()).any(1)


def find_distinct(prediction: Prediction, source: Tensor, cut: Tensor) -> Tensor:
    """Return the indices of the boxes that are no second find of an object in another window, by falling scores.

    Whole boxes come before cut ones, and higher scores before lower ones. A box is a second find where one before it,
    of the same class and another window, overlaps it by more than half: of their union, or where it is cut, of the
    smaller box, since a cut box is a part of its object.
    """
    boxes, scores, labels = (prediction[key] for key in ("boxes", "scores", "labels"))
    order = sorted(range(len(boxes)), key=lambda i: (bool(cut[i]), -float(scores[i])))
    area = box_area(boxes)
    is_kept = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for i in order:
        rivals = (is_kept & (labels == labels[i]) & (source != source[i])).nonzero()[:, 0]
        top_left = torch.maximum(boxes[rivals, :2], boxes[i, :2])
        bottom_right = torch.minimum(boxes[rivals, 2:], boxes[i, 2:])
        shared = (bottom_right - top_left).clamp(min=0).prod(1)
        smaller, union = torch.minimum(area[rivals], area[i]), area[rivals] + area[i] - shared
        is_kept[i] = not (shared > SAME * (smaller if cut[i] else union)).any()
    kept = is_kept.nonzero()[:, 0]
    return kept[scores[kept].argsort(descending=True, stable=True)]
