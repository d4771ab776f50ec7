"""Object detection and instance segmentation: torchvision's detectors on any timm backbone, with or without neck."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from shunted_lit.models.detectors import DETECTORS, build_detector, detect
from shunted_lit.models.feature_path import FeaturePath
from shunted_lit.tasks.base import BaseTask
from shunted_lit.utils.distributed import gather_lists
from shunted_lit.visualization.plots import draw_predictions

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class MeanAP(MeanAveragePrecision):
    """torchmetrics', which hangs where processes have other numbers of images."""

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for name in self._defaults:
            own = apply_to_collection(getattr(self, name), Tensor, Tensor.cpu)
            setattr(self, name, gather_lists(own))


class DetectionTask(BaseTask):
    """Trains and evaluates a detector; batches are those of `shunted_lit.data`.

    Logs `train/loss` and each part of it, and `val/map`, `val/map_50`, `val/map_small`, `val/map_medium`,
    `val/map_large` (COCO's average precision; small is under 32 x 32 pixels, large from 96 x 96; -1 where the
    validation set has no such object). mask_rcnn logs the same of its masks besides, as `val/mask_map` and so on.
    `test` logs the same under `test/`.

    In evaluation, a prediction does not depend on the other images of its batch: only images of one size share one.

    Args:
        num_classes: number of classes; from the data, in `shunted-lit`.
        class_names: a name for each class; from the data, in `shunted-lit`.
        detector: "fcos", "retinanet", "faster_rcnn" or "mask_rcnn".
        backbone: name of a timm model, shunted_t, shunted_s and shunted_b among them.
        pretrained: start the backbone from timm's published weights.
        weights: start from a file instead, all of it from a detector's checkpoint (where classes differ in number,
            their layers start anew, and so do necks that it has not), or the backbone from one of the authors', of
            timm or of `shunted-lit fit` on classes. Or .safetensors of these.
        neck: keywords of `ShuntedTransformer`, {} for its defaults, null for no neck.
        neck_levels: levels that get a neck; level l has stride 2 ** l.
        levels: levels of the backbone that the pyramid is built from.
        extra_levels: coarser pyramid levels on top: 0, 1 (published for R-CNNs) or 2 (for FCOS and RetinaNet).
        pyramid_channels: channels of the pyramid; the heads of R-CNNs are as wide as published over 256.
        anchor_scale: size of the anchors over the published one; less than 1 for small images or objects.
        min_size: short side that images are scaled to; of several, training draws one an image.
        max_size: bound on the long side.
        freeze_backbone: train neck, pyramid and head alone.
        grad_checkpointing: compute backbone and neck again in the backward pass: less memory, more time.
        backbone_options: further keywords for `timm.create_model`.
        detector_options: further keywords for torchvision's detector, such as `score_thresh`.
        lr: peak learning rate.
        weight_decay: AdamW's, on weights other than norms and biases.
        warmup_epochs: epochs, or a fraction of one, over which the rate rises to `lr`.
        min_lr: the rate at the end.
        warmup_lr: the rate at the start.
        lr_batch: images a step for which the rates are meant; they are scaled to those of this run. null: as they are.
        schedule: "cosine", "poly" or "constant", after the warm-up.
        power: of "poly".
        milestones: epochs at whose start the rate is divided by 10.
    """

    monitor = "val/map"
    adjustable = ("min_size", "max_size", "detector_options")
    MEASURES = ("map", "map_50", "map_small", "map_medium", "map_large")

    @classmethod
    def annotation_for(cls, options: Mapping[str, Any]) -> str:
        entry = DETECTORS.get(options.get("detector", "fcos"))
        return entry.annotation if entry else "boxes"  # of an unknown one the constructor tells

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        detector: str = "fcos",
        backbone: str = "resnet18",
        pretrained: bool = False,
        weights: str | None = None,
        neck: dict[str, Any] | None = None,
        neck_levels: list[int] = [5],  # noqa: B006 - read only; a list, as YAML and checkpoints hold it
        levels: list[int] = [3, 4, 5],  # noqa: B006
        extra_levels: int = 2,
        pyramid_channels: int = 256,
        anchor_scale: float = 1.0,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        freeze_backbone: bool = False,
        grad_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
        detector_options: dict[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.05,
        warmup_epochs: float = 0.5,
        min_lr: float = 1e-6,
        warmup_lr: float = 0.0,
        lr_batch: int | None = None,
        schedule: str = "cosine",
        power: float = 0.9,
        milestones: list[float] = [],  # noqa: B006
    ):
        super().__init__(
            num_classes, class_names, lr, weight_decay, warmup_epochs, min_lr, warmup_lr, lr_batch, schedule, power,
            milestones,
        )  # fmt: skip
        # A checkpoint holds weights of its own: nothing is fetched or read for it.
        self.save_hyperparameters(ignore=["pretrained", "weights"])
        whole = self.whole(weights, pretrained, "detector")
        features = FeaturePath(
            backbone, pretrained=pretrained, levels=levels, neck=neck, neck_levels=neck_levels,
            freeze_backbone=freeze_backbone, backbone_options=backbone_options,
            weights=None if whole else weights, grad_checkpointing=grad_checkpointing,
        )  # fmt: skip
        self.detector = build_detector(
            detector,
            features,
            num_classes,
            pyramid_channels,
            extra_levels,
            anchor_scale,
            min_size,
            max_size,
            **(detector_options or {}),
        )
        if whole:
            classifiers = [f"detector.{name}" for name in DETECTORS[detector].classifiers]
            necks = [f"detector.backbone.body.necks.{level}" for level in features.necks]
            self.start_from(whole, str(weights), classifiers, necks)
        self.annotation = DETECTORS[detector].annotation
        kinds: list[Any] = ["bbox"] if self.annotation == "boxes" else ["bbox", "segm"]
        # One a kind: one for both would take small and large of the masks by the boxes' areas.
        self.mean_ap: Any = nn.ModuleDict({kind: MeanAP(iou_type=kind, backend="faster_coco_eval") for kind in kinds})

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Images [(3, H_i, W_i)] in 0..1 -> [{"boxes": (n, 4) x1 y1 x2 y2 in pixels, "labels", "scores": (n,)}], and
        "masks" (n, H_i, W_i), bool, of mask_rcnn."""
        return detect(self.detector, images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.detector(images, targets)
        loss = sum(losses.values())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": part for name, part in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        results = self(images)
        for metric in self.mean_ap.values():
            metric.update(results, targets)

    def on_validation_epoch_end(self) -> None:
        self._log_mean_ap("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_mean_ap("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        return self(batch[0])

    def draw(self, path: Path, samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        images, truths = zip(*samples, strict=True)
        results = [result for image in images for result in self([image.to(self.device, self.dtype)])]
        predictions = [{key: value.cpu() for key, value in result.items()} for result in results]
        draw_predictions(path, images, truths, predictions, self.class_names)

    def _log_mean_ap(self, stage: str) -> None:
        boxes: dict[str, Tensor] = {}
        for kind, metric in self.mean_ap.items():
            prefix = "mask_" if kind == "segm" else ""
            scores = metric.compute()
            metric.reset()
            boxes = boxes or scores
            for name in self.MEASURES:
                if scores[name] == -1 and boxes[name] != -1:  # its word for masks also where nothing was found
                    scores[name] = boxes[name].new_zeros(())
                shown = name in self.MEASURES[:2]
                self.log(f"{stage}/{prefix}{name}", scores[name].float(), prog_bar=shown)
