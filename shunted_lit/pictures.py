"""Pictures for people: predictions beside the truth, and the curves of a run."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from torchvision.ops import nms

MIN_SCORE = 0.3  # of the predicted boxes that are drawn
MAX_OVERLAP = 0.5  # of two that overlap by more, whatever their classes, the better one is drawn


def class_colour(label: int) -> str:
    return f"C{label % 10}"  # of matplotlib's ten


def shown(prediction: dict[str, Any]) -> dict[str, Any]:
    """What of a prediction is drawn: `boxes`, `labels` and `scores` from MIN_SCORE, the best one of a place."""
    keep = nms(prediction["boxes"], prediction["scores"], MAX_OVERLAP)
    keep = keep[prediction["scores"][keep] >= MIN_SCORE]
    return {key: prediction[key][keep] for key in ("boxes", "labels", "scores")}


def draw_boxes(axes: Axes, image: Tensor, target: dict[str, Any]) -> None:
    """An image (3, H, W) in 0..1 with `boxes` (n, 4) x1 y1 x2 y2, coloured by `labels`, and `scores`, if any."""
    axes.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().float().numpy())
    axes.set_axis_off()
    for i, (box, label) in enumerate(zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True)):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.2, edgecolor=class_colour(label)))
        if "scores" in target:
            axes.text(x1, y1 - 1, f"{target['scores'][i]:.2f}", fontsize=5, color=class_colour(label))


def draw_predictions(
    path: Path,
    images: Sequence[Tensor],
    truths: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    class_names: Sequence[str],
) -> None:
    """Writes pairs of an image with its true boxes and the same with the predicted ones, and a legend."""
    predictions = [shown(prediction) for prediction in predictions]
    pairs_a_row = 3
    rows = math.ceil(len(images) / pairs_a_row)
    figure = Figure(figsize=(pairs_a_row * 4.2, rows * 2.25 + 0.5), layout="constrained", dpi=120)
    grid = figure.subplots(rows, 2 * pairs_a_row, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    cells = grid.reshape(-1, 2)
    for (left, right), image, truth, prediction in zip(cells, images, truths, predictions, strict=False):
        draw_boxes(left, image, truth)
        draw_boxes(right, image, prediction)
        left.set_title("true", fontsize=7, pad=2)
        right.set_title("predicted", fontsize=7, pad=2)
    seen = sorted({label for target in (*truths, *predictions) for label in target["labels"].tolist()})[:20]
    handles = [Patch(color=class_colour(label), label=class_names[label]) for label in seen]
    if handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold any character
    figure.savefig(path)


def draw_classes(
    path: Path, images: Sequence[Tensor], labels: Sequence[int], probabilities: Tensor, class_names: Sequence[str]
) -> None:
    """Writes images, each under its predicted class and that one's probability; wrong ones in red, with the truth."""
    rows = math.ceil(len(images) / 6)
    columns = math.ceil(len(images) / rows)
    figure = Figure(figsize=(columns * 1.6, rows * 1.9), layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    best, predicted = probabilities.max(dim=-1)
    for axes, image, label, score, guess in zip(
        grid.flat, images, labels, best.tolist(), predicted.tolist(), strict=False
    ):
        axes.imshow(image.permute(1, 2, 0).cpu().numpy())
        if guess == label:
            axes.set_title(f"{class_names[guess]} {score:.2f}", fontsize=8, parse_math=False)
        else:
            title = f"{class_names[guess]} {score:.2f}, is {class_names[label]}"
            axes.set_title(title, fontsize=8, color="red", parse_math=False)
    figure.savefig(path)


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and values of each column of a metrics.csv, as Lightning's CSVLogger writes it."""
    series: dict[str, tuple[list[int], list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    steps, values = series.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(value))
    return series


def draw_curves(path: Path, metrics: Path) -> None:
    """Writes the training losses on the left, and what validation measured on the right, over the steps."""
    series = read_metrics(metrics)
    figure = Figure(figsize=(10, 3.8), layout="constrained", dpi=120)
    left, right = figure.subplots(1, 2)
    for axes, prefix, title in ((left, "train/", "training"), (right, "val/", "validation")):
        for name, (steps, values) in sorted(series.items()):
            known = [(step, value) for step, value in zip(steps, values, strict=True) if value != -1]  # -1: no object
            if name.startswith(prefix) and known:
                marker = "." if len(known) < 30 else None
                axes.plot(*zip(*known, strict=True), label=name.removeprefix(prefix), linewidth=1.2, marker=marker)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(path)
