"""Outlines of objects in label files, polygons and run lengths: checking them and drawing them as masks."""

from typing import Any

import faster_coco_eval.core.mask as coco_mask
import numpy as np
from contourpy import FillType, contour_generator

from shunted_lit.data.validation import is_number

Segment = list[list[float]] | dict[str, Any]  # polygons x1 y1 x2 y2 ..., or COCO's run lengths {"size", "counts"}


def find_mask_fault(segment: Any, height: int, width: int, slack: float) -> str | None:
    """Return what is wrong with COCO's `segmentation` of an image of this size; None where nothing is.

    Args:
        segment: Polygons, or run lengths as a list of counts or as COCO's compressed text.
        height: Height of the image.
        width: Width of the image.
        slack: Distance by which a polygon may exceed the image.
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
            return "has run lengths that are not all integers of at least 0"
        if sum(counts) != height * width:
            return f"has run lengths that sum to {sum(counts)} pixels, but its image has {height * width}"
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
        return "is one list of numbers; expected a list of polygons, [[x1, y1, x2, y2, x3, y3, ...], ...]"
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not all(map(is_number, polygon)):
            count = len(polygon) if isinstance(polygon, list) else 0
            return f"has a polygon of {count} numbers; expected an even count of at least 6, all finite"
        xs, ys = polygon[0::2], polygon[1::2]
        if min(xs) < -slack or min(ys) < -slack or max(xs) > width + slack or max(ys) > height + slack:
            return f"has a polygon that is not within the image of {width} x {height}"
    return None if any(map(polygon_area, polygons)) else "has no area"


def polygon_area(polygon: list[float]) -> float:
    """Return the area of a polygon x1 y1 x2 y2 ... by the shoelace formula."""
    xs, ys = np.asarray(polygon, dtype=float).reshape(-1, 2).T
    return abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1))) / 2


def draw_mask(segment: Segment, height: int, width: int, scale: tuple[float, float] = (1, 1)) -> np.ndarray:
    """Draw polygons or run lengths as a mask (height, width), bool; polygons as COCO's own tools draw them.

    Args:
        segment: Polygons or run lengths that `find_mask_fault` accepts.
        height: Height of the image.
        width: Width of the image.
        scale: Pixels per unit of a polygon's x and y.
    """
    if isinstance(segment, list):
        polygons = [(np.reshape(polygon, (-1, 2)) * scale).flatten().tolist() for polygon in segment]
        segment = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    elif isinstance(segment["counts"], list):
        segment = coco_mask.frPyObjects(segment, height, width)  # type: ignore[assignment]
    return coco_mask.decode(segment).astype(bool)


def trace_polygons(mask: np.ndarray) -> list[list[float]]:
    """Return the outlines x1 y1 x2 y2 ... of a mask (H, W), bool, such that `draw_mask` draws the same mask.

    Each connected part is a polygon. COCO's polygons have no holes: the outline of a hole is joined to that of its part
    by a line that is passed in both directions, and so covers nothing.
    """
    y, x = mask.nonzero()
    if not len(y):
        return []
    top, left = y.min(), x.min()
    part = mask[top : y.max() + 1, left : x.max() + 1]  # much faster than the whole image
    contours = contour_generator(z=np.pad(part, 1).astype(float), fill_type=FillType.OuterOffset)  # holes by part
    polygons = []
    for points, offsets in zip(*contours.filled(0.5, 1.5), strict=True):
        places = points - 0.5 + (left, top)
        rings = np.split(places, offsets[1:-1])  # of a part and its holes, each ending where it starts
        polygon = np.concatenate([*rings, *(ring[:1] for ring in rings[-2::-1])])[:-1]
        step = np.diff(polygon, axis=0, append=polygon[:1])
        corners = polygon[(step != np.roll(step, 1, axis=0)).any(axis=1)]
        polygons.append(corners.flatten().tolist())
    return polygons


def encode_run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return COCO's run lengths, in the form that JSON stores, of a mask (H, W)."""
    encoded = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
