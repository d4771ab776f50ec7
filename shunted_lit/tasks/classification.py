"""Image classification: any timm model, trained by the recipe of the reference implementation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import Normalize
from torchvision.transforms.v2.functional import to_dtype

from shunted_lit.models.feature_path import check_model_name, check_weights_source, state_dict_and_classifiers
from shunted_lit.models.weights import load_matching_weights
from shunted_lit.tasks.base import BaseTask
from shunted_lit.tasks.optim import parameters_without_decay
from shunted_lit.utils.checks import check_fraction, check_minimum
from shunted_lit.visualization.plots import draw_classes

Batch = tuple[Tensor, Tensor]


class ClassificationTask(BaseTask):
    """Train and evaluate a classifier.

    A batch is images (B, 3, H, W), uint8, and labels (B,), int64, from 0. The defaults suit a small data set;
    `configs/imagenet` holds the reference implementation's recipe for ImageNet. Images are normalized here with the
    mean and standard deviation that timm gives for the model. As in timm's training script, random erasing, mixup and
    cutmix follow, on whole batches.

    Logs `train/loss`, `val/loss`, `val/acc1` and `val/acc5` (top-1 and top-5 accuracy, in 0..1), and for `test` the
    same under `test/`.

    Args:
        num_classes: Number of classes; the command line takes it from the data.
        class_names: Names of the classes; the command line takes them from the data.
        backbone: Name of a timm model, such as shunted_t, shunted_s or shunted_b.
        pretrained: Start from timm's pretrained weights.
        weights: Start from a file instead: a checkpoint of the reference implementation, of timm or of `shunted-lit`,
            or .safetensors. Where the number of classes differs, the head starts from scratch.
        drop_path_rate: Stochastic depth, rising from 0 at the first block to this rate at the last.
        mixup: Alpha of mixup (Zhang et al., arXiv 1710.09412); 0: none.
        cutmix: Alpha of cutmix (Yun et al., arXiv 1905.04899); 0: none.
        mixup_prob: Fraction of batches that mixup or cutmix changes.
        mixup_switch_prob: Fraction of these that cutmix changes, where both are used.
        random_erasing: Fraction of images with an area replaced by noise (Zhong et al., arXiv 1708.04896).
        label_smoothing: Fraction of the label's weight that is spread over all classes.
        layer_decay: Learning rate of a block relative to the block above it, for fine-tuning; null: equal rates.
        grad_checkpointing: Recompute blocks in the backward pass: less memory, more time.
        backbone_options: Further keywords of `timm.create_model`.
        lr: Peak learning rate.
        warmup_epochs: Epochs, or a fraction of one, over which the learning rate rises from `warmup_lr` to `lr`.
        **optim: Further settings of the optimizer, see `OptimizerConfig`.

    Raises:
        ValueError: timm has no such model, the weights do not fit, or a setting is out of range.
    """

    monitor = "val/acc1"
    annotation = "class"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
        *,
        backbone: str = "shunted_t",
        pretrained: bool = False,
        weights: str | None = None,
        drop_path_rate: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        random_erasing: float = 0.0,
        label_smoothing: float = 0.0,
        layer_decay: float | None = None,
        grad_checkpointing: bool = False,
        backbone_options: dict[str, Any] | None = None,
        lr: float = 1e-3,
        warmup_epochs: float = 1.0,
        **optim: Any,
    ):
        super().__init__(num_classes, class_names, lr=lr, warmup_epochs=warmup_epochs, **optim)
        check_minimum(2, num_classes=num_classes)
        check_minimum(0, mixup=mixup, cutmix=cutmix)
        check_fraction(
            drop_path_rate=drop_path_rate, mixup_prob=mixup_prob, mixup_switch_prob=mixup_switch_prob,
            random_erasing=random_erasing, label_smoothing=label_smoothing, layer_decay=layer_decay,
        )  # fmt: skip
        if layer_decay == 0:
            raise ValueError("`layer_decay` must be above 0, got 0: only the head would learn. null: equal rates.")
        options = dict(backbone_options or {})
        if drop_path_rate:
            if "drop_path_rate" in options:
                raise ValueError("`drop_path_rate` is also in `backbone_options`; give it once.")
            options["drop_path_rate"] = drop_path_rate
        model: Any = build_classifier(backbone, num_classes, pretrained=pretrained, weights=weights, options=options)
        if grad_checkpointing:
            model.set_grad_checkpointing()
        self.model = model
        self.normalize = Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        self.random_erasing, self.label_smoothing, self.layer_decay = random_erasing, label_smoothing, layer_decay
        self.mixup: Mixup | None = None
        if mixup or cutmix:
            self.mixup = Mixup(
                mixup, cutmix, None, mixup_prob, mixup_switch_prob, label_smoothing=0.0, num_classes=num_classes
            )
        accuracy = {
            f"acc{k}": MulticlassAccuracy(num_classes, top_k=min(k, num_classes), average="micro") for k in (1, 5)
        }
        self.val_accuracy = MetricCollection(dict(accuracy), prefix="val/", compute_groups=False)
        self.test_accuracy = self.val_accuracy.clone(prefix="test/")
        self.mean_loss = MeanMetric()  # Lightning's own mean over ranks rounds the images per rank down

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.layer_decay is None:
            return super().parameter_groups()
        names = {name.removeprefix("model.") for name in parameters_without_decay(self)}
        return param_groups_layer_decay(
            self.model, self.optim.weight_decay, no_weight_decay_list=names, layer_decay=self.layer_decay
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W), uint8 or floating point in 0..1, to logits (B, num_classes)."""
        return self.model(self.normalize_images(images))

    def normalize_images(self, images: Tensor) -> Tensor:
        """Normalize images (B, 3, H, W) and convert them to the precision of the network."""
        return self.normalize(to_dtype(images, torch.float32, scale=True)).to(self.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        images = self.normalize_images(images)
        if self.random_erasing:
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        if self.mixup is not None:
            if len(images) % 2:
                raise ValueError(
                    f"Mixup and cutmix need an even batch size, got {len(images)} images; choose an even `batch_size` "
                    "that is no larger than the training split of a device."
                )
            images, labels = self.mixup(images, labels)
        # Labels are (B,), or (B, num_classes) once mixed. Smoothing either equals timm's losses.
        loss = F.cross_entropy(self.model(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.test_accuracy)

    def _evaluate(self, batch: Batch, stage: str, accuracy: MetricCollection) -> None:
        images, labels = batch
        logits = self(images)
        accuracy.update(logits, labels)
        self.mean_loss.update(F.cross_entropy(logits, labels, reduction="none"))
        self.log(f"{stage}/loss", self.mean_loss, batch_size=len(images))
        self.log_dict(accuracy, prog_bar=True, batch_size=len(images))

    def draw(self, path: Path, samples: Sequence[tuple[Tensor, int]]) -> None:
        images, labels = zip(*samples, strict=True)
        probabilities = torch.cat([self(image[None].to(self.device)).softmax(-1).cpu() for image in images])
        draw_classes(path, images, labels, probabilities, self.class_names)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return probabilities (B, num_classes) of images (B, 3, H, W), or of a list of images of any sizes."""
        images = batch[0]
        logits = self(images) if isinstance(images, Tensor) else torch.cat([self(image[None]) for image in images])
        return logits.softmax(-1)


def build_classifier(
    name: str, num_classes: int, *, pretrained: bool, weights: str | None, options: dict[str, Any]
) -> nn.Module:
    """Create a timm model from scratch, from timm's pretrained weights, or from those of a file.

    Raises:
        ValueError: The name is unknown, both kinds of weights are given, or the weights do not fit.
    """
    check_model_name(name)
    if reserved := sorted({"num_classes", "features_only", "pretrained", "checkpoint_path"} & options.keys()):
        raise ValueError(f"`backbone_options` must not contain {', '.join(reserved)}: the task sets it.")
    check_weights_source(pretrained, weights)
    model: Any = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    if weights is not None:
        state, heads = state_dict_and_classifiers(weights, model)
        load_matching_weights(model, state, weights, classifiers=heads)
    return model
