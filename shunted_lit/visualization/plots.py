"""Pictures for people: predictions beside the truth, and the curves of a run."""

import colorsys
import csv
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import nms
from torchvision.transforms.v2.functional import rgb_to_grayscale, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from shunted_lit.data.segmentation import IGNORED

MIN_SCORE = 0.3  # of the predicted boxes that are drawn
MAX_OVERLAP = 0.5  # of two that overlap by more, whatever their classes, the better one is drawn


OPACITY = 0.6  # of masks and label maps over their image


def class_colour(label: int) -> tuple[float, float, float]:
    """Red, green and blue in 0..1: matplotlib's ten, then hues that keep apart."""
    if label < 10:
        return to_rgb(f"C{label}")
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.5 + label % 3 / 4, 0.95 - label // 3 % 3 / 5)


def class_bytes(label: int) -> tuple[int, int, int]:
    """The same in 0..255."""
    red, green, blue = (round(255 * part) for part in class_colour(label))
    return red, green, blue


def to_bytes(image: Tensor) -> Tensor:
    """An image (3, H, W) in 0..1, or uint8 -> uint8, on the CPU."""
    image = image.detach().cpu()
    return image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().byte()


def with_masks(image: Tensor, masks: Tensor, labels: Iterable[int]) -> Tensor:
    """An image (3, H, W) under masks (n, H, W) in the colours of their labels -> uint8.

    Below a mask the image is grey: its own colours would be taken for another class's. Where masks overlap, the first
    one is seen.
    """
    if not len(masks):
        return to_bytes(image)
    colours: Any = [class_bytes(label) for label in labels]
    image, masks = to_bytes(image), masks.bool().cpu()
    masks = masks & (masks.cumsum(0) == 1)
    grey = torch.where(masks.any(0), rgb_to_grayscale(image, 3), image)
    return draw_segmentation_masks(grey, masks, alpha=OPACITY, colors=colours)


def with_map(image: Tensor, label_map: Tensor) -> Tensor:
    """An image (3, H, W) under a label map (H, W) in the colours of the classes, 255 left as it is -> uint8."""
    labels = classes_in([label_map])
    masks = label_map.cpu()[None] == torch.tensor(labels, dtype=torch.int64)[:, None, None]
    return with_masks(image, masks, labels)


def classes_in(label_maps: Iterable[Tensor]) -> list[int]:
    """The classes that label maps hold, in order."""
    found = {label for label_map in label_maps for label in label_map.unique().tolist()}
    return sorted(found - {IGNORED})


def shown(prediction: dict[str, Any], min_score: float = MIN_SCORE) -> dict[str, Any]:
    """What of a prediction is drawn: `boxes`, `labels`, `scores`, `masks` from that score, the best one of a place."""
    keep = nms(prediction["boxes"], prediction["scores"], MAX_OVERLAP)
    keep = keep[prediction["scores"][keep] >= min_score]
    return {key: prediction[key][keep] for key in ("boxes", "labels", "scores", "masks") if key in prediction}


def show(axes: Axes, image: Tensor) -> None:
    axes.imshow(to_bytes(image).permute(1, 2, 0).numpy())
    axes.set_axis_off()


def draw_boxes(axes: Axes, image: Tensor, target: dict[str, Any]) -> None:
    """An image (3, H, W) in 0..1 with `boxes` (n, 4) x1 y1 x2 y2; `labels` colour them; `scores`, `masks`, if any."""
    labels = target["labels"].tolist()
    show(axes, with_masks(image, target["masks"], labels) if "masks" in target else image)
    for i, (box, label) in enumerate(zip(target["boxes"].tolist(), labels, strict=True)):
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.2, edgecolor=class_colour(label)))
        if "scores" in target:
            axes.text(x1, y1 - 1, f"{target['scores'][i]:.2f}", fontsize=7, color=class_colour(label))


def draw_pairs(
    path: Path, pairs: Sequence[tuple[Callable[[Axes], None], Callable[[Axes], None]]], seen: Sequence[int],
    class_names: Sequence[str],
) -> None:  # fmt: skip
    """Writes pairs of what draws the truth and what draws the prediction, and a legend of the classes seen."""
    pairs_a_row = 3
    rows = math.ceil(len(pairs) / pairs_a_row)
    figure = Figure(figsize=(pairs_a_row * 4.2, rows * 2.25 + 0.5), layout="constrained", dpi=120)
    grid = figure.subplots(rows, 2 * pairs_a_row, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for cells, pair in zip(grid.reshape(-1, 2), pairs, strict=False):
        for axes, draw, title in zip(cells, pair, ("true", "predicted"), strict=True):
            draw(axes)
            axes.set_title(title, fontsize=7, pad=2)
    handles = [Patch(color=class_colour(label), label=class_names[label]) for label in seen[:20]]
    if handles:
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold any character
    figure.savefig(path)


def draw_predictions(
    path: Path,
    images: Sequence[Tensor],
    truths: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    class_names: Sequence[str],
) -> None:
    """Writes pairs of an image with its true boxes and the same with the predicted ones, and a legend."""
    predictions = [shown(prediction) for prediction in predictions]
    pairs = [
        (partial(draw_boxes, image=image, target=truth), partial(draw_boxes, image=image, target=prediction))
        for image, truth, prediction in zip(images, truths, predictions, strict=True)
    ]
    seen = sorted({label for target in (*truths, *predictions) for label in target["labels"].tolist()})
    draw_pairs(path, pairs, seen, class_names)


def draw_maps(
    path: Path,
    images: Sequence[Tensor],
    truths: Sequence[Tensor],
    predictions: Sequence[Tensor],
    class_names: Sequence[str],
) -> None:
    """Writes pairs of an image under its true label map (H, W) and the same under the predicted one, and a legend."""
    pairs = [
        (partial(show, image=with_map(image, truth)), partial(show, image=with_map(image, prediction)))
        for image, truth, prediction in zip(images, truths, predictions, strict=True)
    ]
    draw_pairs(path, pairs, classes_in([*truths, *predictions]), class_names)


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


# --- one image as predicted, in its own pixels

LEAST_SIDE = 480  # longer side below which an image is drawn several times as large, so that names can be read
FONT = findfont("DejaVu Sans")  # comes with matplotlib


def enlarged(image: Tensor) -> tuple[Tensor, int]:
    """An image (3, H, W) repeated pixel by pixel until it is large enough to be drawn on, and how many times."""
    times = max(round(LEAST_SIDE / max(image.shape[-2:])), 1)
    return image.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2), times


def with_legend(image: Tensor, entries: Sequence[tuple[int, str]]) -> Image.Image:
    """An image (3, H, W), uint8, above names, each after the colour of its class."""
    picture = to_pil_image(image)
    size = max(picture.width // 50, 12)
    font = ImageFont.truetype(FONT, size)
    places, x, y = [], size // 2, picture.height + size // 2
    for label, text in entries:
        width = int(font.getlength(text)) + 3 * size
        if x > size // 2 and x + width > picture.width:
            x, y = size // 2, y + size * 3 // 2
        places.append((x, y, label, text))
        x += width
    height = y + 2 * size if entries else picture.height
    sheet = Image.new("RGB", (picture.width, height), "white")
    sheet.paste(picture)
    pen = ImageDraw.Draw(sheet)
    for x, y, label, text in places:
        pen.rectangle((x, y, x + size, y + size), fill=class_bytes(label))
        pen.text((x + size * 3 // 2, y + size // 2), text, fill="black", font=font, anchor="lm")
    return sheet


def picture_of_boxes(
    image: Tensor, prediction: dict[str, Any], class_names: Sequence[str], min_score: float = MIN_SCORE
) -> Image.Image:
    """An image (3, H, W), uint8, with what is `shown` of a prediction: masks, boxes with their scores, a legend."""
    found = shown(prediction, min_score)
    labels = found["labels"].tolist()
    image = with_masks(image, found["masks"], labels) if "masks" in found else image
    image, times = enlarged(image)
    if labels:
        side = max(image.shape[-2:])
        image = draw_bounding_boxes(
            image,
            found["boxes"] * times,
            labels=[f"{score:.2f}" for score in found["scores"].tolist()],
            colors=[class_bytes(label) for label in labels],
            width=max(side // 300, 2),
            font=FONT,
            font_size=max(side // 60, 10),
            label_colors="white",
            fill_labels=True,
        )
    return with_legend(image, [(label, class_names[label]) for label in sorted(set(labels))])


def picture_of_map(image: Tensor, label_map: Tensor, class_names: Sequence[str]) -> Image.Image:
    """An image (3, H, W), uint8, under its label map (H, W), with a legend."""
    return with_legend(
        enlarged(with_map(image, label_map))[0], [(label, class_names[label]) for label in classes_in([label_map])]
    )


def picture_of_class(
    image: Tensor, labels: Sequence[int], scores: Sequence[float], class_names: Sequence[str]
) -> Image.Image:
    """An image (3, H, W), uint8, above its most probable classes."""
    entries = [(label, f"{class_names[label]} {score:.2f}") for label, score in zip(labels, scores, strict=True)]
    return with_legend(enlarged(image)[0], entries)


def png_palette(count: int) -> list[int]:
    """Colours of the classes for the palette of a PNG, black for the rest."""
    return [part for label in range(count) for part in class_bytes(label)] + [0] * 3 * (256 - count)


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
