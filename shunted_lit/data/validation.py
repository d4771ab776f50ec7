"""What is wrong with data on disk: gathered, so that all of it is told in one go."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger(__name__)

BadBoxes = Literal["error", "drop"]


class DataError(ValueError):
    """All that is wrong with a set; the message shows the first ten, and tells how many there are.

    Args:
        faults: each with its file, and its line or number.
        source: the set.
        advice: what else to say where there are several.
    """

    SHOWN = 10

    def __init__(self, faults: Sequence[str], source: Path | str, advice: str = ""):
        self.faults = list(faults)
        shown = "\n".join(self.faults[: self.SHOWN])
        count = len(self.faults)
        told = f"{count} faults" + (f", the first {self.SHOWN} of them above" if count > self.SHOWN else "")
        super().__init__(shown + advice if count == 1 else f"{shown}\n{source}: {told}{advice}")


class LabelCheck:
    """Gathers what is wrong as a reader of labels meets it, so that all of it is told in one go.

    Args:
        bad_boxes: "error", or "drop" to leave objects with a bad box or mask out and say how many at the end.
    """

    def __init__(self, bad_boxes: BadBoxes = "error"):
        self.bad_boxes = bad_boxes
        self.faults: list[str] = []
        self.dropped = 0

    def accepts(self, box: Sequence[float], width: float, height: float, slack: float, where: str) -> bool:
        """Whether x1 y1 x2 y2 has an area and lies within `width` and `height`, give or take `slack` of rounding."""
        x1, y1, x2, y2 = box
        if not (x2 > x1 and y2 > y1):
            fault = "has no area"
        elif x1 < -slack or y1 < -slack or x2 > width + slack or y2 > height + slack:
            fault = f"is not within the image of {width:g} x {height:g}"
        else:
            return True
        corners = " ".join(f"{value:g}" for value in box)
        self.reject(f"{where}: the box {corners} (x1 y1 x2 y2) {fault}")
        return False

    def reject(self, told: str) -> None:
        """An object that is a fault, or left out and counted."""
        if self.bad_boxes == "error":
            self.fail(f"{told}; mend it, or set bad_boxes to drop")
        else:
            self.dropped += 1

    def fail(self, told: str) -> None:
        """A fault that nothing but mending helps."""
        self.faults.append(told)

    def report(self, source: Path | str) -> None:
        """Raises them, if any; logs how many objects were left out."""
        if self.faults:
            raise DataError(self.faults, source)
        if self.dropped:
            log.warning(
                "%s: left out %d boxes of no area, outside their image, or with a damaged mask", source, self.dropped
            )


class FaultDataset(Dataset[str]):
    """What is wrong with each sample of a data set, "" where nothing is."""

    def __init__(self, dataset: Any, decode: bool):
        self.dataset, self.decode = dataset, decode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> str:
        try:
            if self.decode:
                self.dataset.read(index)
            else:
                self.dataset.check_header(index)
        except ValueError as error:
            return str(error)
        return ""


def find_damaged_samples(dataset: Any, workers: int, decode: bool, what: str) -> list[str]:
    """Faults of a data set that has `look` and `read`, in order; a progress bar meanwhile.

    Args:
        dataset: `look` reads headers, `read` all of a sample; both raise ValueError.
        workers: processes.
        decode: whether to read all.
        what: is looked at, for the bar.
    """
    if len(dataset) < 512 and not decode:
        workers = 0  # faster than processes start
    loader = DataLoader(FaultDataset(dataset, decode), batch_size=64, num_workers=workers, collate_fn=list)
    told = (fault for batch in loader for fault in batch)
    console = Console(stderr=True)
    bar = track(
        told, f"Checking {what}", len(dataset), transient=True, console=console, disable=not console.is_terminal
    )
    return [fault for fault in bar if fault]
