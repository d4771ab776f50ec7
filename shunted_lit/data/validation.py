"""Errors in data on disk, collected so that one message reports all of them."""

import logging
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

BadBoxes = Literal["error", "drop"]
Value = TypeVar("Value", bound=Hashable)


class DataError(ValueError):
    """All errors of a data set; the message shows the first ten and the total.

    Args:
        faults: A message for each error, with its file, and its line or number.
        source: The data set.
        advice: Sentence to add to the message.
    """

    SHOWN = 10

    def __init__(self, faults: Sequence[str], source: Path | str, advice: str = ""):
        self.faults = list(faults)
        lines = self.faults[: self.SHOWN]
        if (count := len(self.faults)) > 1:
            lines.append(
                f"{source}: {count} faults" + (f", the first {self.SHOWN} above." if count > self.SHOWN else ".")
            )
        super().__init__("\n".join(lines) + (f" {advice}" if advice else ""))


class LabelCheck:
    """Collects the errors of a label reader.

    Args:
        bad_boxes: "error" to record an object with a bad box or mask as an error, "drop" to skip and count it.
    """

    def __init__(self, bad_boxes: BadBoxes = "error"):
        self.bad_boxes = bad_boxes
        self.faults: list[str] = []
        self.dropped = 0

    def accepts(self, box: Sequence[float], width: float, height: float, slack: float, where: str) -> bool:
        """Return whether a box x1 y1 x2 y2 has an area and lies within the image, up to `slack`; else reject it."""
        x1, y1, x2, y2 = box
        if not (x2 > x1 and y2 > y1):
            problem = "has no area"
        elif x1 < -slack or y1 < -slack or x2 > width + slack or y2 > height + slack:
            problem = f"is not within the image of {width:g} x {height:g}"
        else:
            return True
        corners = " ".join(f"{value:g}" for value in box)
        self.reject(f"{where}: the box {corners} (x1 y1 x2 y2) {problem}")
        return False

    def reject(self, problem: str) -> None:
        """Record a bad object as an error, or count it as dropped."""
        if self.bad_boxes == "error":
            self.fail(f"{problem}; correct it, or set `bad_boxes` to drop.")
        else:
            self.dropped += 1

    def fail(self, message: str) -> None:
        """Record an error that `bad_boxes` cannot drop."""
        self.faults.append(message)

    def report(self, source: Path | str) -> None:
        """Raise DataError for the recorded errors, if any; log the number of dropped objects."""
        if self.faults:
            raise DataError(self.faults, source)
        if self.dropped:
            log.warning(
                "%s: dropped %d objects with no area, outside their image, or with a damaged mask", source, self.dropped
            )


def find_faults_in_batch(dataset: Any, decode: bool, indices: list[int]) -> list[str]:
    faults = []
    for index in indices:
        try:
            dataset.read(index) if decode else dataset.check_header(index)
        except ValueError as error:
            faults.append(str(error))
    return faults


def find_damaged_samples(dataset: Any, num_workers: int, decode: bool, name: str) -> list[str]:
    """Return the error messages of damaged samples in order; show a progress bar on a terminal.

    Args:
        dataset: Data set with `check_header(index)` and `read(index)`, which raise ValueError for a damaged sample.
        num_workers: Number of processes.
        decode: Whether to read whole samples instead of headers.
        name: Name of the data set on the progress bar.
    """
    if len(dataset) < 512 and not decode:
        num_workers = 0  # faster than starting processes
    find_faults = partial(find_faults_in_batch, dataset, decode)  # the loader's workers call it
    indices: Any = range(len(dataset))
    loader = DataLoader(indices, batch_size=64, num_workers=num_workers, collate_fn=find_faults)
    console = Console(stderr=True)
    bar = track(loader, f"Checking {name}", transient=True, console=console, disable=not console.is_terminal)
    return [fault for faults in bar for fault in faults]


def find_repeated(values: Iterable[Value]) -> list[Value]:
    """Return the values that occur more than once, in the order of their first occurrence."""
    return [value for value, count in Counter(values).items() if count > 1]


def is_number(value: Any) -> bool:
    """Return whether a value of a JSON file is a finite number below 1e15."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15  # false for nan


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
