"""Slices: overlapping windows of a large image, for small objects that a scaled-down image would lose."""

import math
from dataclasses import dataclass

from shunted_lit.utils.checks import check_minimum

Window = tuple[int, int, int, int]  # x1 y1 x2 y2 in pixels


@dataclass(frozen=True)
class Slices:
    """How images are cut into windows.

    Args:
        size: side of a window in pixels; a smaller image is one window.
        overlap: least overlap of neighbours, as a fraction of their side. An object on a seam is found whole where it
            is not larger than the overlap.

    Raises:
        ValueError: a side below 1, or an overlap that is negative, or 1 and more.
    """

    size: int
    overlap: float = 0.2

    def __post_init__(self) -> None:
        check_minimum(1, slices=self.size)
        if not 0 <= self.overlap < 1:
            raise ValueError(f"`overlap` must be at least 0 and below 1, got {self.overlap}.")

    def starts(self, length: int) -> list[int]:
        """Return where windows start on a side of an image: as few as possible, at equal distances."""
        if length <= self.size:
            return [0]
        step = max(1, math.floor(self.size * (1 - self.overlap)))
        steps = math.ceil((length - self.size) / step)
        return [round(i * (length - self.size) / steps) for i in range(steps + 1)]

    def windows(self, height: int, width: int) -> list[Window]:
        """Return the windows of an image, row by row."""
        return [
            (x, y, min(x + self.size, width), min(y + self.size, height))
            for y in self.starts(height)
            for x in self.starts(width)
        ]
