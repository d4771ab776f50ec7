"""Report of a run: pictures and tables at the end of training, validation and test."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shunted_lit.tasks import BaseTask
from shunted_lit.training.loggers import log_picture
from shunted_lit.utils.checks import check_minimum
from shunted_lit.visualization.plots import draw_curves, read_metrics


class RunReport(Callback):
    """Print a table of scores; after `fit`, also draw curves.png and predictions.png (of the best checkpoint).

    Args:
        images: number of validation images in predictions.png.

    Raises:
        ValueError: the number is negative.
    """

    def __init__(self, images: int = 9):
        check_minimum(0, **{"report.images": images})
        self.images = images
        self.start_time = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_time = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # a broadcast: all ranks must take part
        if not trainer.is_global_zero or trainer.fast_dev_run or trainer.interrupted or not log_dir:  # type: ignore[attr-defined]
            return
        if not trainer.loggers:  # there is no run folder
            self._print_scores(trainer)
            return
        folder = Path(log_dir)
        metrics = folder / "metrics.csv"
        if metrics.is_file():
            draw_curves(folder / "curves.png", metrics)
        if isinstance(pl_module, BaseTask):
            self._draw_predictions(folder / "predictions.png", trainer, pl_module)
        pictures = [path for path in (folder / "predictions.png", folder / "curves.png") if path.is_file()]
        for logger in trainer.loggers:
            for picture in pictures:
                log_picture(logger, picture, trainer.global_step)
        self._print_table(folder, metrics, trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print_scores(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print_scores(trainer)

    @staticmethod
    def _print_scores(trainer: Trainer) -> None:
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: all ranks must take part
        if not trainer.is_global_zero:
            return
        table = Table("", "", title=Text(str(log_dir or "")), show_header=False)
        for name, value in sorted(trainer.callback_metrics.items()):
            table.add_row(name, format_score(float(value)))
        console = Console()
        console.print(table)
        if log_dir:
            print_classes(console, Path(log_dir) / "class_iou.csv", "classes")

    def _draw_predictions(self, path: Path, trainer: Trainer, task: BaseTask) -> None:
        if not trainer.val_dataloaders or self.images < 1:
            return
        dataset = trainer.val_dataloaders.dataset
        count = min(self.images, len(dataset))
        samples = [dataset[i * len(dataset) // count] for i in range(count)]  # spread: they may be sorted
        last = {name: value.clone() for name, value in task.state_dict().items()}
        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if best:
            task.load_state_dict(torch.load(best, map_location=task.device, weights_only=True)["state_dict"])
        was_training = task.training
        task.eval()
        with torch.no_grad():
            task.draw(path, samples)
        task.train(was_training)
        task.load_state_dict(last)

    def _print_table(self, folder: Path, metrics: Path, trainer: Trainer) -> None:
        series = read_metrics(metrics) if metrics.is_file() else {}
        table = Table("", "best", "last", title=Text(f"{folder}, {time.monotonic() - self.start_time:.0f} s"))
        for name, (_, values) in sorted(series.items()):
            if name.startswith("val/") or name == "train/loss":
                best = min(values) if name.endswith("loss") else max(values)
                table.add_row(name, format_score(best), format_score(values[-1]))
        console = Console()
        console.print(table)
        print_classes(console, folder / "class_iou.csv", "classes, at the best validation")
        checkpoint: Any = trainer.checkpoint_callback
        for label, path in (("best checkpoint", getattr(checkpoint, "best_model_path", "")),
                            ("last checkpoint", getattr(checkpoint, "last_model_path", ""))):  # fmt: skip
            if path:
                console.print(f"{label}: {path}", soft_wrap=True, markup=False)


def format_score(score: float) -> str:
    """Format a score; torchmetrics returns -1 if there is no object of a size."""
    return f"{score:.4f}" if score != -1 else "no such object"


def print_classes(console: Console, path: Path, title: str) -> None:
    """Print the scores of each class that segmentation writes to a CSV file in the run folder."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
