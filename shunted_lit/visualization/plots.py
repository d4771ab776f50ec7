"""Pictures of predictions next to the ground truth, of single predictions, and of the curves of a run.

Images are (3, H, W), floating point in 0..1 or uint8. Boxes are (n, 4) as x1 y1 x2 y2 in pixels.
"""

import colorsys
import csv
import math
from collections.abc import Iterable, Sequence
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

from shunted_lit.utils.labels import IGNORED

Target = dict[str, Any] | Tensor  # `boxes`, `labels`, perhaps `scores` and `masks` (n, H, W); or a label map (H, W)

MIN_SCORE = 0.3  # lowest score of the predicted boxes that are drawn
MAX_OVERLAP = 0.5  # IoU above which only the better of two boxes of any class is drawn
OPACITY = 0.6  # of masks and label maps over their image
MIN_SIDE = 480  # pixels of the longer side below which an image is enlarged, so that text on it can be read
FONT = findfont("DejaVu Sans")  # comes with matplotlib


def class_colour(label: int) -> tuple[float, float, float]:
    """Return red, green and blue in 0..1: matplotlib's ten colours, then distinct hues."""
    if label < 10:
        return to_rgb(f"C{label}")
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.5 + label % 3 / 4, 0.95 - label // 3 % 3 / 5)


def class_rgb(label: int) -> tuple[int, int, int]:
    """Return `class_colour` in 0..255."""
    red, green, blue = (round(255 * value) for value in class_colour(label))
    return red, green, blue


def png_palette(count: int) -> list[int]:
    """Return the 256 colours of a PNG palette: those of the classes, then black."""
    return [value for label in range(count) for value in class_rgb(label)] + [0] * 3 * (256 - count)


def to_uint8(image: Tensor) -> Tensor:
    image = image.detach().cpu()
    return image if image.dtype == torch.uint8 else (image.float().clamp(0, 1) * 255).round().byte()


def overlay_masks(image: Tensor, masks: Tensor, labels: Iterable[int]) -> Tensor:
    """Draw masks (n, H, W) over an image in the colours of their labels -> (3, H, W), uint8.

    The image is grey below the masks, since its colours could be taken for those of classes. The first of several
    overlapping masks is visible.
    """
    if not len(masks):
        return to_uint8(image)
    colours: Any = [class_rgb(label) for label in labels]
    image, masks = to_uint8(image), masks.bool().cpu()
    masks = masks & (masks.cumsum(0) == 1)
    grey = torch.where(masks.any(0), rgb_to_grayscale(image, 3), image)
    return draw_segmentation_masks(grey, masks, alpha=OPACITY, colors=colours)


def overlay_label_map(image: Tensor, label_map: Tensor) -> Tensor:
    """Draw a label map (H, W) over an image in the colours of its classes; ignored pixels keep the image."""
    labels = present_classes([label_map])
    masks = label_map.cpu()[None] == torch.tensor(labels, dtype=torch.int64)[:, None, None]
    return overlay_masks(image, masks, labels)


def present_classes(targets: Iterable[Target]) -> list[int]:
    """Return the sorted classes that occur in targets."""
    labels: set[int] = set()
    for target in targets:
        if isinstance(target, dict):
            labels.update(target["labels"].tolist())
        else:
            labels.update(target.unique().tolist())
    labels.discard(IGNORED)
    return sorted(labels)


def select_visible(prediction: dict[str, Any], min_score: float = MIN_SCORE) -> dict[str, Any]:
    """Select the objects to draw: those of `min_score` or more, and the best one of each place."""
    keep = nms(prediction["boxes"], prediction["scores"], MAX_OVERLAP)
    keep = keep[prediction["scores"][keep] >= min_score]
    return {key: prediction[key][keep] for key in ("boxes", "labels", "scores", "masks") if key in prediction}


# --- figures of a run: several images, or curves


def make_grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure of `size` inches and its axes (rows, columns), which are switched off."""
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def show_image(axes: Axes, image: Tensor) -> None:
    axes.imshow(to_uint8(image).permute(1, 2, 0).numpy())
    axes.set_axis_off()


def draw_boxes(axes: Axes, image: Tensor, target: dict[str, Any]) -> None:
    """Draw an image with `boxes` (n, 4) in the colours of `labels` (n,), and `scores` and `masks` if there are any."""
    labels = target["labels"].tolist()
    show_image(axes, overlay_masks(image, target["masks"], labels) if "masks" in target else image)
    for i, ((x1, y1, x2, y2), label) in enumerate(zip(target["boxes"].tolist(), labels, strict=True)):
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, linewidth=1.2, edgecolor=class_colour(label)))
        if "scores" in target:
            axes.text(x1, y1 - 1, f"{target['scores'][i]:.2f}", fontsize=7, color=class_colour(label))


def draw_predictions(
    path: Path,
    images: Sequence[Tensor],
    truths: Sequence[Target],
    predictions: Sequence[Target],
    class_names: Sequence[str],
) -> None:
    """Save pairs of images with their true and their predicted boxes or label maps, and a legend of the classes."""
    predictions = [select_visible(target) if isinstance(target, dict) else target for target in predictions]
    pairs_per_row = 3
    rows = math.ceil(len(images) / pairs_per_row)
    figure, grid = make_grid(rows, 2 * pairs_per_row, (pairs_per_row * 4.2, rows * 2.25 + 0.5))
    panels = iter(grid.flat)
    for image, *targets in zip(images, truths, predictions, strict=True):
        for target, title in zip(targets, ("true", "predicted"), strict=True):
            axes = next(panels)
            if isinstance(target, dict):
                draw_boxes(axes, image, target)
            else:
                show_image(axes, overlay_label_map(image, target))
            axes.set_title(title, fontsize=7, pad=2)
    labels = present_classes([*truths, *predictions])[:20]
    if labels:
        handles = [Patch(color=class_colour(label), label=class_names[label]) for label in labels]
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 10), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)  # names may hold any character
    figure.savefig(path)


def draw_classes(
    path: Path, images: Sequence[Tensor], labels: Sequence[int], probabilities: Tensor, class_names: Sequence[str]
) -> None:
    """Save images titled with their predicted class and its probability; wrong ones in red, with the true class."""
    rows = math.ceil(len(images) / 6)
    columns = math.ceil(len(images) / rows)
    figure, grid = make_grid(rows, columns, (columns * 1.6, rows * 1.9))
    best, predicted = probabilities.max(dim=-1)
    for axes, image, label, score, guess in zip(
        grid.flat, images, labels, best.tolist(), predicted.tolist(), strict=False
    ):
        axes.imshow(image.permute(1, 2, 0).cpu().numpy())
        title, colour = f"{class_names[guess]} {score:.2f}", "black"
        if guess != label:
            title, colour = f"{title}, is {class_names[label]}", "red"
        axes.set_title(title, fontsize=8, color=colour, parse_math=False)
    figure.savefig(path)


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return the steps and values of each column of a metrics.csv of Lightning's CSVLogger."""
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
    """Save the curves of a metrics.csv over the steps: training on the left, validation on the right."""
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


# --- pictures of one prediction, in the pixels of its image


def enlarge(image: Tensor) -> tuple[Tensor, int]:
    """Repeat the pixels of a small image until text on it can be read; return it and the factor."""
    factor = max(round(MIN_SIDE / max(image.shape[-2:])), 1)
    return image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2), factor


def add_legend(image: Tensor, entries: Sequence[tuple[int, str]]) -> Image.Image:
    """Return an image (uint8) with a legend below: for each entry a square in the colour of its label, and a text."""
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
        pen.rectangle((x, y, x + size, y + size), fill=class_rgb(label))
        pen.text((x + size * 3 // 2, y + size // 2), text, fill="black", font=font, anchor="lm")
    return sheet


def picture_of_boxes(
    image: Tensor, prediction: dict[str, Any], class_names: Sequence[str], min_score: float = MIN_SCORE
) -> Image.Image:
    """Return an image (uint8) with the visible masks, boxes and scores of a prediction, and a legend."""
    visible = select_visible(prediction, min_score)
    labels = visible["labels"].tolist()
    image = overlay_masks(image, visible["masks"], labels) if "masks" in visible else image
    image, factor = enlarge(image)
    if labels:
        side = max(image.shape[-2:])
        image = draw_bounding_boxes(
            image,
            visible["boxes"] * factor,
            labels=[f"{score:.2f}" for score in visible["scores"].tolist()],
            colors=[class_rgb(label) for label in labels],
            width=max(side // 300, 2),
            font=FONT,
            font_size=max(side // 60, 10),
            label_colors="white",
            fill_labels=True,
        )
    return add_legend(image, [(label, class_names[label]) for label in sorted(set(labels))])


def picture_of_map(image: Tensor, label_map: Tensor, class_names: Sequence[str]) -> Image.Image:
    """Return an image (uint8) under its label map (H, W), and a legend."""
    entries = [(label, class_names[label]) for label in present_classes([label_map])]
    return add_legend(enlarge(overlay_label_map(image, label_map))[0], entries)


def picture_of_class(
    image: Tensor, labels: Sequence[int], scores: Sequence[float], class_names: Sequence[str]
) -> Image.Image:
    """Return an image (uint8) and a legend of its most probable classes."""
    entries = [(label, f"{class_names[label]} {score:.2f}") for label, score in zip(labels, scores, strict=True)]
    return add_legend(enlarge(image)[0], entries)
