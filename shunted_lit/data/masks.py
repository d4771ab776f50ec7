"""Outlines of objects as label files hold them: polygons and run lengths, judged and drawn as masks."""

from typing import Any

import faster_coco_eval.core.mask as coco_mask
import numpy as np

Segment = list[list[float]] | dict[str, Any]  # polygons x1 y1 x2 y2 ..., or COCO's run lengths {"size", "counts"}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # false of nan


def find_mask_fault(segment: Any, height: int, width: int, slack: float) -> str | None:
    """What is wrong with COCO's `segmentation` of an image of this size; None where nothing is.

    Args:
        segment: polygons, or run lengths, counted or as COCO's text.
        slack: pixels that a polygon may overrun its image by.
    """
    if isinstance(segment, list):
        return find_polygon_fault(segment, height, width, slack)
    if not isinstance(segment, dict) or not {"size", "counts"} <= segment.keys():
        return "is neither a list of polygons nor run lengths with size and counts"
    if segment["size"] != [height, width]:
        return f"has the size {segment['size']}, but its image [height, width] {[height, width]}"
    counts = segment["counts"]
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return "has run lengths that are not all whole numbers of 0 or more"
        if sum(counts) != height * width:
            return f"has run lengths of {sum(counts)} pixels together, but its image has {height * width}"
        covered = sum(counts[1::2])
    elif isinstance(counts, str):
        try:
            covered = int(coco_mask.decode(segment).sum())
        except (RuntimeError, ValueError) as error:
            return f"has damaged run lengths ({error})"
    else:
        return "has counts that are neither a list nor text"
    return None if covered else "covers no pixel"


def find_polygon_fault(polygons: list[Any], height: int, width: int, slack: float) -> str | None:
    if not polygons:
        return "is empty"
    if all(map(is_number, polygons)):
        return "is one list of numbers; a list of polygons is needed, [[x1, y1, x2, y2, x3, y3, ...], ...]"
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            count = len(polygon) if isinstance(polygon, list) else 0
            return f"has a polygon of {count} numbers; an even number, 6 or more, all finite, is needed"
        xs, ys = polygon[0::2], polygon[1::2]
        if min(xs) < -slack or min(ys) < -slack or max(xs) > width + slack or max(ys) > height + slack:
            return f"has a polygon that is not within the image of {width} x {height}"
    return None if any(map(area, polygons)) else "has no area"


def area(polygon: list[float]) -> float:
    """By the shoelace formula."""
    xs, ys = polygon[0::2], polygon[1::2]
    return abs(sum(x * y2 - x2 * y for x, y, x2, y2 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True))) / 2


def draw_mask(segment: Segment, height: int, width: int, scale: tuple[float, float] = (1, 1)) -> np.ndarray:
    """The mask (height, width), bool, of polygons or run lengths; polygons are drawn as COCO's own tools do.

    Args:
        scale: pixels that a polygon's x and y count in.
    """
    if isinstance(segment, list):
        polygons = [[value * scale[i % 2] for i, value in enumerate(polygon)] for polygon in segment]
        segment = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif isinstance(segment["counts"], list):
        segment = coco_mask.frPyObjects(segment, height, width)  # type: ignore[assignment]
    return coco_mask.decode(segment).astype(bool)


def encode_run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths of a mask (H, W), as JSON holds them."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
