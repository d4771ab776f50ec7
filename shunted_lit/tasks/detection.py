"""Object detection and instance segmentation: torchvision's detectors on a feature path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.apply_func import apply_to_collection
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from shunted_lit.models.detectors import DETECTORS, build_detector, detect, max_detections
from shunted_lit.tasks.feature_path import FeaturePathTask
from shunted_lit.utils.distributed import gather_lists
from shunted_lit.visualization.plots import draw_predictions

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class DistributedMeanAP(MeanAveragePrecision):
    """COCO's mean average precision over ranks that may have different numbers of images.

    torchmetrics gathers image by image, and hangs where the numbers differ. It has no public hook for this.
    """

    def _sync_dist(self, dist_sync_fn: Any = None, process_group: Any = None) -> None:
        for name in self._defaults:
            on_cpu = apply_to_collection(getattr(self, name), Tensor, Tensor.cpu)
            setattr(self, name, gather_lists(on_cpu))


class DetectionTask(FeaturePathTask):
    """Train and evaluate a detector.

    A batch is a list of images (3, H, W) in 0..1 and a list of targets, as `build_detector` describes them.

    Logs `train/loss` and each of its terms; `val/map`, `val/map_50`, `val/map_small`, `val/map_medium` and
    `val/map_large` (COCO's average precision; small is below 32 x 32 pixels, large from 96 x 96; -1 where the
    validation split has no such object); for mask_rcnn the same of its masks as `val/mask_map` and so on; and for
    `test` the same under `test/`. As in COCO, the 100 highest scores of an image count: or as many as
    `detections_per_img` allows where that is more, and 1,000 in slices.

    In evaluation only images of one size share a batch, so a prediction does not depend on the other images. Where the
    data set `slices`, each window of an image is predicted alone, and the predictions are joined.

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Names of the classes; the command line takes them from the data.
        detector: "fcos", "retinanet", "faster_rcnn" or "mask_rcnn".
        levels: Levels of the backbone that the pyramid is built from; level l has stride 2 ** l.
        extra_levels: Coarser pyramid levels on top: 0, 1 (as published for R-CNNs) or 2 (for FCOS and RetinaNet).
        pyramid_channels: Channels of the pyramid; the published heads of R-CNNs have 256.
        anchor_scale: Size of the anchors relative to the published one; below 1 for small images or objects.
        min_size: Short side that images are scaled to, in pixels; of a list, training draws one for each image.
        max_size: Upper bound of the long side, in pixels.
        detector_options: Further keywords of torchvision's detector, such as `score_thresh`.
        backbone: Name of a timm model, such as shunted_t, shunted_s or shunted_b.
        **settings: Settings of the feature path, see `FeaturePathTask`, and of the optimizer, see `OptimizerConfig`.

    Raises:
        ValueError: A setting is out of range, or the weights do not fit.
    """

    monitor = "val/map"
    evaluation_settings = ("min_size", "max_size", "detector_options")
    network = "detector"
    takes_slices = True
    MAX_DETECTIONS = 1000  # of an image in slices that count in scores
    METRICS = ("map", "map_50", "map_small", "map_medium", "map_large")

    @classmethod
    def required_annotation(cls, options: Mapping[str, Any]) -> str:
        entry = DETECTORS.get(options.get("detector", "fcos"))
        return entry.annotation if entry else "boxes"  # the constructor reports an unknown detector

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        *,
        detector: str = "fcos",
        levels: list[int] = [3, 4, 5],  # noqa: B006 - read only; a list, as in YAML and checkpoints
        extra_levels: int = 2,
        pyramid_channels: int = 256,
        anchor_scale: float = 1.0,
        min_size: int | list[int] = 800,
        max_size: int = 1333,
        detector_options: dict[str, Any] | None = None,
        backbone: str = "resnet18",
        **settings: Any,
    ):
        super().__init__(num_classes, class_names, backbone=backbone, **settings)
        features = self.build_features(levels=levels)
        self.detector = build_detector(
            detector,
            features,
            num_classes,
            pyramid_channels=pyramid_channels,
            extra_levels=extra_levels,
            anchor_scale=anchor_scale,
            min_size=min_size,
            max_size=max_size,
            **(detector_options or {}),
        )
        self.load_network_weights(
            classifiers=[f"detector.{name}" for name in DETECTORS[detector].classifiers],
            optional=[f"detector.backbone.body.necks.{level}" for level in features.necks],
        )
        self.annotation = DETECTORS[detector].annotation
        iou_types: list[Any] = ["bbox", "segm"] if self.annotation == "masks" else ["bbox"]
        # A metric each: a shared one would take the sizes small to large of masks from their boxes.
        self.mean_ap: Any = nn.ModuleDict(
            {iou_type: DistributedMeanAP(iou_type=iou_type, backend="faster_coco_eval") for iou_type in iou_types}
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        counted = max(100, max_detections(self.detector), self.MAX_DETECTIONS if self.slices else 0)
        for metric in self.mean_ap.values():
            metric.max_detection_thresholds = [1, 10, counted]

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Map images [(3, H_i, W_i)] in 0..1 to predictions, see `build_detector`."""
        return detect(self.detector, images, self.slices)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.detector(images, targets)
        loss = sum(losses.values())
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        self.log_dict({f"train/{name}": term for name, term in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, targets = batch
        results = self(images)
        for metric in self.mean_ap.values():
            metric.update(results, targets)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Tensor]]:
        return self(batch[0])

    def draw(self, path: Path, samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> None:
        images, truths = zip(*samples, strict=True)
        results = [result for image in images for result in self([image.to(self.device, self.dtype)])]
        predictions = [{key: value.cpu() for key, value in result.items()} for result in results]
        draw_predictions(path, images, truths, predictions, self.class_names)

    def log_scores(self, stage: str) -> None:
        box_scores: dict[str, Tensor] = {}
        for iou_type, metric in self.mean_ap.items():
            prefix = "mask_" if iou_type == "segm" else ""
            scores = metric.compute()
            metric.reset()
            box_scores = box_scores or scores
            for name in self.METRICS:
                if scores[name] == -1 and box_scores[name] != -1:  # there are objects, but no mask was predicted
                    scores[name] = box_scores[name].new_zeros(())
                self.log(f"{stage}/{prefix}{name}", scores[name].float(), prog_bar=name == "map")
