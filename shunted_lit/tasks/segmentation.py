"""Semantic segmentation: a decoder of segmentation_models_pytorch on a feature path."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from shunted_lit.models.feature_path import group_by_size
from shunted_lit.models.segmenters import LEVELS, Segmenter, segment
from shunted_lit.tasks.feature_path import FeaturePathTask
from shunted_lit.utils.checks import check_minimum, check_positive
from shunted_lit.utils.distributed import loss_denominator
from shunted_lit.utils.labels import IGNORED
from shunted_lit.visualization.plots import draw_predictions

log = logging.getLogger(__name__)

Batch = tuple[list[Tensor], list[Tensor]]


class SegmentationTask(FeaturePathTask):
    """Train and evaluate a segmenter.

    A batch is a list of images (3, H, W) in 0..1 and a list of label maps (H, W). Pixels labelled 255 have no class and
    count in neither loss nor metrics.

    Logs `train/loss` (cross-entropy, mean over the labelled pixels), `val/miou` (intersection over union, mean over the
    classes that are labelled or predicted) and `val/pixel_acc`, and for `test` the same under `test/`. The scores per
    class of the best validation are in `class_iou.csv` in the folder of the run, and printed at its end.

    In evaluation each image is predicted alone and in its own size, so nothing depends on the rest of its batch.

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Names of the classes; the command line takes them from the data.
        decoder: "fpn" (Semantic FPN), "upernet" or "segformer"; `Segmenter` lists the differences from the paper's.
        auxiliary_weight: Weight of the loss of an auxiliary head on level 4; 0: no such head.
        short_side: Length in pixels that the shorter side of an image is scaled to for evaluation; null: its own size.
            Predictions are scaled back.
        window: Side in pixels of the windows that evaluation slides over an image; null: the whole image at once.
        window_stride: Pixels from one window to the next; null: two thirds of a window.
        head_lr: Learning rate of decoder and heads relative to that of backbone and necks.
        decoder_options: Further keywords of the decoder's class.
        min_lr: Learning rate at the end of training.
        schedule: Decay after the warm-up: "cosine", "poly", which is (1 - progress) ** power, or "constant".
        **settings: Settings of the feature path, see `FeaturePathTask`, and of the optimizer, see `OptimizerConfig`.

    Raises:
        ValueError: A setting is out of range, or the weights do not fit.
    """

    monitor = "val/miou"
    annotation = "map"
    evaluation_settings = ("short_side", "window", "window_stride")
    network = "segmenter"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        *,
        decoder: str = "fpn",
        auxiliary_weight: float = 0.0,
        short_side: int | None = None,
        window: int | None = None,
        window_stride: int | None = None,
        head_lr: float = 1.0,
        decoder_options: dict[str, Any] | None = None,
        min_lr: float = 0.0,
        schedule: str = "poly",
        **settings: Any,
    ):
        super().__init__(num_classes, class_names, min_lr=min_lr, schedule=schedule, **settings)
        check_minimum(1, short_side=short_side, window=window, window_stride=window_stride)
        if window_stride is not None and (window is None or window_stride > window):
            raise ValueError(
                f"`window_stride` must be at most `window` ({window}), got {window_stride}: no pixel may be left out."
            )
        check_minimum(0, auxiliary_weight=auxiliary_weight)
        check_positive(head_lr=head_lr)
        features = self.build_features(levels=LEVELS)
        has_auxiliary = auxiliary_weight > 0
        self.segmenter = Segmenter(decoder, features, num_classes, auxiliary=has_auxiliary, **(decoder_options or {}))
        self.load_network_weights(
            classifiers=["segmenter.head", "segmenter.auxiliary.4"],
            optional=[*(f"segmenter.features.necks.{level}" for level in features.necks), "segmenter.auxiliary"],
        )
        self.auxiliary_weight, self.head_lr = auxiliary_weight, head_lr
        self.evaluation = {"short_side": short_side, "window": window, "stride": window_stride}
        # Label values are checked when masks are read; a check here would cost more than the counting.
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self.best_miou = -1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_miou"] = self.best_miou

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and (table := self._table()) is not None and table.is_file():
            self.best_miou = checkpoint.get("best_miou", -1.0)  # a run resumed in its folder keeps its table

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Map images [(3, H_i, W_i)] in 0..1 to logits [(num_classes, H_i, W_i)]."""
        return [segment(self.segmenter, image, **self.evaluation) for image in images]

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.head_lr == 1:
            return groups
        in_features = {id(parameter) for parameter in self.segmenter.features.parameters()}
        return [
            {**group, "params": parameters, "lr_scale": lr_scale}
            for group in groups
            for lr_scale, is_body in ((1.0, True), (self.head_lr, False))
            if (parameters := [p for p in group["params"] if (id(p) in in_features) is is_body])
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, maps = batch
        if len(group_by_size(images)) > 1:
            sizes = sorted({tuple(image.shape[-2:]) for image in images})
            raise ValueError(f"Training images of a batch must have one size, got {sizes}; set the data's `crop_size`.")
        if len(images) < 2 and self.hparams["decoder"] == "upernet":
            raise ValueError(
                "upernet needs at least 2 images in a training batch, got 1: it normalizes over a map of one pixel. "
                "Raise the data's `batch_size`."
            )
        logits, auxiliary = self.segmenter.logits(torch.stack(images))
        target = torch.stack(maps).long()
        loss = cross_entropy(logits, target)
        if auxiliary is not None:
            auxiliary = F.interpolate(auxiliary, size=target.shape[-2:], mode="bilinear", align_corners=False)
            auxiliary_loss = cross_entropy(auxiliary, target)
            self.log("train/loss_auxiliary", auxiliary_loss, batch_size=len(images))
            loss = loss + self.auxiliary_weight * auxiliary_loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, maps = batch
        for logits, target in zip(self(images), maps, strict=True):
            self.confusion.update(logits.argmax(0)[None], target.long()[None])

    def predict_step(self, batch: tuple[list[Tensor], Any], batch_idx: int) -> list[Tensor]:
        """Return label maps [(H_i, W_i)], int64."""
        return [logits.argmax(0) for logits in self(batch[0])]

    def draw(self, path: Path, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        images, truths = zip(*samples, strict=True)
        maps = [logits.argmax(0).cpu() for image in images for logits in self([image.to(self.device, self.dtype)])]
        draw_predictions(path, images, truths, maps, self.class_names)

    def log_scores(self, stage: str) -> None:
        confusion = self.confusion.compute().double()
        self.confusion.reset()
        hits, pixels = confusion.diag(), confusion.sum(1)
        iou = hits / (pixels + confusion.sum(0) - hits)  # nan where a class is neither labelled nor predicted
        if not pixels.any() and not self.trainer.sanity_checking:  # the sanity check sees few images
            raise ValueError(f"Masks must have a class on at least one pixel, but all pixels are {IGNORED} (no class).")
        miou = float(iou.nanmean())
        self.log(f"{stage}/miou", miou, prog_bar=True)
        self.log(f"{stage}/pixel_acc", float(hits.sum() / pixels.sum()))
        if self.trainer.sanity_checking or self.is_tuning:
            return
        if self.best_miou < 0:
            self._warn_of_absent_classes(pixels)
        if miou >= self.best_miou:
            self.best_miou = miou
            self._write_table(iou.tolist(), (hits / pixels).tolist(), pixels.long().tolist())

    def _warn_of_absent_classes(self, pixels: Tensor) -> None:
        """Warn of classes without a pixel: the values of the masks may mean something else, such as 255 for objects."""
        absent = [name for name, count in zip(self.class_names, pixels.tolist(), strict=True) if not count]
        if absent and self.trainer.is_global_zero:
            names = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            log.warning("%d of %d classes (%s) have no pixel in these masks, where %d means no class",
                        len(absent), len(self.class_names), names, IGNORED)  # fmt: skip

    def _table(self) -> Path | None:
        """Return the file for the scores per class, None where nothing is logged."""
        folder = self.trainer.log_dir  # a collective operation: all ranks must call it
        return None if folder is None or not self.trainer.loggers else Path(folder) / "class_iou.csv"

    def _write_table(self, iou: list[float], recall: list[float], pixels: list[int]) -> None:
        table = self._table()
        if table is None or not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("class", "iou", "accuracy", "pixels"))
            for row in zip(self.class_names, iou, recall, pixels, strict=True):
                writer.writerow(f"{value:.4f}" if isinstance(value, float) else value for value in row)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean cross-entropy over the labelled pixels of all ranks; 0 where there are none.

    Args:
        logits: (B, num_classes, H, W).
        target: Label maps (B, H, W), int64; `IGNORED` for pixels without a class.
    """
    pixels = loss_denominator((target != IGNORED).sum())
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum") / pixels
