"""Semantic segmentation: a decoder of segmentation_models_pytorch on any timm backbone, with or without the neck."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from shunted_lit.models.feature_path import FeaturePath, group_by_size
from shunted_lit.models.segmenters import LEVELS, Segmenter, segment
from shunted_lit.tasks.base import BaseTask
from shunted_lit.utils.distributed import loss_denominator
from shunted_lit.utils.labels import IGNORED
from shunted_lit.visualization.plots import draw_predictions

log = logging.getLogger(__name__)

Batch = tuple[list[Tensor], list[Tensor]]


class SegmentationTask(BaseTask):
    """Trains and evaluates a segmenter; batches are lists of images (3, H, W) in 0..1 and label maps (H, W), 255 for
    pixels of no class, which count nowhere.

    Logs `train/loss` (cross-entropy, mean over the labelled pixels), `val/miou` (intersection over union, mean over the
    classes that are there or predicted) and `val/pixel_acc`; `test` logs the same under `test/`. The table of classes
    of the best validation is `class_iou.csv` in the run's folder, and in the terminal at the end.

    In evaluation, each image is predicted by itself, in its own size: nothing depends on the others of its batch.

    Args:
        num_classes: number of classes; from the data, in `shunted-lit`.
        class_names: a name for each class; from the data, in `shunted-lit`.
        decoder: "fpn" (Semantic FPN), "upernet" or "segformer"; how they differ from the paper's: `Segmenter`.
        backbone: name of a timm model, shunted_t, shunted_s and shunted_b among them.
        pretrained: start the backbone from timm's published weights.
        weights: start from a file instead, all of it from a segmenter's checkpoint (where classes differ in number,
            their layers start anew, and so do necks and an auxiliary head that it has not), or the backbone from one
            of the authors', of timm or of `shunted-lit fit` on classes. Or .safetensors of these.
        neck: keywords of `ShuntedTransformer`, {} for its defaults, null for no neck.
        neck_levels: levels that get a neck, of 2, 3, 4 and 5; level l has stride 2 ** l.
        auxiliary_weight: weight of the loss of an auxiliary head on level 4; 0 for no such head.
        short_side: what the shorter side of an image is scaled to for evaluation; null for its own size. Predictions
            are scaled back.
        window: side of the windows that evaluation slides over an image; null for the whole image at once.
        window_stride: pixels from a window to the next; null for two thirds of a window.
        head_lr: rate of decoder and heads over that of the backbone and necks.
        freeze_backbone: train neck and decoder alone.
        grad_checkpointing: compute backbone and neck again in the backward pass: less memory, more time.
        backbone_options: further keywords for `timm.create_model`.
        decoder_options: further keywords for the decoder's class.
        lr: peak learning rate.
        weight_decay: AdamW's, on weights other than norms and biases.
        warmup_epochs: epochs, or a fraction of one, over which the rate rises from `warmup_lr` to `lr`.
        min_lr: the rate at the end.
        warmup_lr: the rate at the start.
        lr_batch: images a step for which the rates are meant; they are scaled to those of this run. null: as they are.
        schedule: "cosine", "poly" or "constant", after the warm-up.
        power: of "poly".
        milestones: epochs at whose start the rate is divided by 10.
    """

    monitor = "val/miou"
    annotation = "map"
    adjustable = ("short_side", "window", "window_stride")

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        decoder: str = "fpn",
        backbone: str = "shunted_t",
        pretrained: bool = False,
        weights: str | None = None,
        neck: dict[str, Any] | None = None,
        neck_levels: list[int] = [5],  # noqa: B006 - read only; a list, as YAML and checkpoints hold it
        auxiliary_weight: float = 0.0,
        short_side: int | None = None,
        window: int | None = None,
        window_stride: int | None = None,
        head_lr: float = 1.0,
        freeze_backbone: bool = False,
        grad_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
        decoder_options: dict[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.05,
        warmup_epochs: float = 0.5,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        lr_batch: int | None = None,
        schedule: str = "poly",
        power: float = 0.9,
        milestones: list[float] = [],  # noqa: B006
    ):
        super().__init__(
            num_classes, class_names, lr, weight_decay, warmup_epochs, min_lr, warmup_lr, lr_batch, schedule, power,
            milestones,
        )  # fmt: skip
        # A checkpoint holds weights of its own: nothing is fetched or read for it.
        self.save_hyperparameters(ignore=["pretrained", "weights"])
        for name, side in {"short_side": short_side, "window": window, "window_stride": window_stride}.items():
            if side is not None and side < 1:
                raise ValueError(f"{name} is {side}, but 1 or more pixels, or null, are needed")
        if window_stride is not None and (window is None or window_stride > window):
            raise ValueError(f"window_stride is {window_stride} and window {window}; pixels between would be left out")
        if auxiliary_weight < 0 or head_lr <= 0:
            raise ValueError(f"auxiliary_weight is {auxiliary_weight} and head_lr {head_lr}; 0 or more, and above 0")
        whole = self.whole(weights, pretrained, "segmenter")
        features = FeaturePath(
            backbone, pretrained=pretrained, levels=LEVELS, neck=neck, neck_levels=neck_levels,
            freeze_backbone=freeze_backbone, backbone_options=backbone_options,
            weights=None if whole else weights, grad_checkpointing=grad_checkpointing,
        )  # fmt: skip
        self.segmenter = Segmenter(decoder, features, num_classes, auxiliary_weight > 0, **(decoder_options or {}))
        if whole:
            necks = [f"segmenter.features.necks.{level}" for level in features.necks]
            classifiers = ["segmenter.head", "segmenter.auxiliary.4"]
            self.start_from(whole, str(weights), classifiers, [*necks, "segmenter.auxiliary"])
        self.auxiliary_weight, self.head_lr = auxiliary_weight, head_lr
        self.evaluation = {"short_side": short_side, "window": window, "stride": window_stride}
        # Values are judged where label maps are read; here that would cost more than the counting.
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self.best_miou = -1.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_miou"] = self.best_miou

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self._trainer is not None and (table := self._table()) is not None and table.is_file():
            self.best_miou = checkpoint.get("best_miou", -1.0)  # a run that goes on in its folder keeps its table

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Images [(3, H_i, W_i)] in 0..1 -> logits [(classes, H_i, W_i)]."""
        return [segment(self.segmenter, image, **self.evaluation) for image in images]

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.head_lr == 1:
            return groups
        body = {id(parameter) for parameter in self.segmenter.features.parameters()}
        return [
            {**group, "params": parameters, "lr_scale": scale}
            for group in groups
            for scale, inside in ((1.0, True), (self.head_lr, False))
            if (parameters := [p for p in group["params"] if (id(p) in body) is inside])
        ]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, maps = batch
        if len(group_by_size(images)) > 1:
            sizes = sorted({tuple(image.shape[-2:]) for image in images})
            raise ValueError(f"training images of one batch have the sizes {sizes}; cut them to one (crop_size)")
        if len(images) < 2 and self.hparams["decoder"] == "upernet":
            raise ValueError(
                "a step has 1 image, but upernet pools to one pixel and needs 2 or more; use a batch_size >= 2"
            )
        logits, auxiliary = self.segmenter.logits(torch.stack(images))
        target = torch.stack(maps).long()
        loss = cross_entropy(logits, target)
        if auxiliary is not None:
            auxiliary = F.interpolate(auxiliary, size=target.shape[-2:], mode="bilinear", align_corners=False)
            second = cross_entropy(auxiliary, target)
            self.log("train/loss_auxiliary", second, batch_size=len(images))
            loss = loss + self.auxiliary_weight * second
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, maps = batch
        for logits, target in zip(self(images), maps, strict=True):
            self.confusion.update(logits.argmax(0)[None], target.long()[None])

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def predict_step(self, batch: tuple[list[Tensor], Any], batch_idx: int) -> list[Tensor]:
        """Label maps [(H_i, W_i)], uint8 or int64."""
        return [logits.argmax(0) for logits in self(batch[0])]

    def draw(self, path: Path, samples: Sequence[tuple[Tensor, Tensor]]) -> None:
        images, truths = zip(*samples, strict=True)
        maps = [logits.argmax(0).cpu() for image in images for logits in self([image.to(self.device, self.dtype)])]
        draw_predictions(path, images, truths, maps, self.class_names)

    def _log_scores(self, stage: str) -> None:
        confusion = self.confusion.compute().double()
        self.confusion.reset()
        hits, pixels = confusion.diag(), confusion.sum(1)
        iou = hits / (pixels + confusion.sum(0) - hits)  # nan where a class is neither there nor predicted
        if not pixels.any() and not self.trainer.sanity_checking:  # which sees a few images alone
            raise ValueError(f"no pixel of these masks has a class: all are {IGNORED}")
        miou = float(iou.nanmean())
        self.log(f"{stage}/miou", miou, prog_bar=True)
        self.log(f"{stage}/pixel_acc", float(hits.sum() / pixels.sum()), prog_bar=True)
        if not self.trainer.sanity_checking and self.best_miou < 0:
            self._tell_absent(pixels)
        if not self.trainer.sanity_checking and miou >= self.best_miou:
            self.best_miou = miou
            self._write_table(iou.tolist(), (hits / pixels).tolist(), pixels.long().tolist())

    def _tell_absent(self, pixels: Tensor) -> None:
        """Warns of classes that are nowhere: values of the masks may mean something else, such as 255 an object."""
        absent = [name for name, count in zip(self.class_names, pixels.tolist(), strict=True) if not count]
        if absent and self.trainer.is_global_zero:
            told = ", ".join(absent[:5]) + (", ..." if len(absent) > 5 else "")
            log.warning(
                "%d of %d classes (%s) are on no pixel of these masks, where %d stands for no class",
                len(absent), len(self.class_names), told, IGNORED,
            )  # fmt: skip

    def _table(self) -> Path | None:
        folder = self.trainer.log_dir  # asks all ranks, so all have to come here
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
    """Mean over the labelled pixels of (B, classes, H, W) and (B, H, W), of all processes; 0 where there is none."""
    labelled = loss_denominator((target != IGNORED).sum())
    return F.cross_entropy(logits.float(), target, ignore_index=IGNORED, reduction="sum") / labelled
