"""Image classification: any timm model, trained by the recipe of the Shunted Transformer's authors."""

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

from shunted_lit.models.feature_path import check_model_name, state_dict_and_classifiers
from shunted_lit.models.weights import load_matching_weights
from shunted_lit.tasks.base import BaseTask
from shunted_lit.visualization.plots import draw_classes

Batch = tuple[Tensor, Tensor]


class ClassificationTask(BaseTask):
    """Trains and evaluates a classifier; batches are images (B, 3, H, W), uint8, and labels (B,) from 0.

    The defaults train on a small data set; `configs/imagenet` holds the authors' recipe for ImageNet. Images are
    normalized here, by the mean and deviation that timm gives for the model; random erasing, mixup and cutmix follow,
    for a batch at once, as in timm's training script.

    Logs `train/loss`, `val/loss`, `val/acc1` and `val/acc5` (share of images whose class is the first, or among the
    first five); `test` logs the same under `test/`.

    Args:
        num_classes: number of classes; from the data, in `shunted-lit`.
        class_names: a name for each class; from the data, in `shunted-lit`.
        backbone: name of a timm model, shunted_t, shunted_s and shunted_b among them.
        pretrained: start from timm's published weights, where the model has some.
        weights: start from a file instead: a checkpoint of the authors', of timm or of `shunted-lit`, or .safetensors.
            The head is left out where the classes differ in number.
        drop_path_rate: stochastic depth, rising from 0 at the first block to this rate at the last.
        mixup: alpha of mixup (Zhang et al., arXiv 1710.09412); 0 for none.
        cutmix: alpha of cutmix (Yun et al., arXiv 1905.04899); 0 for none.
        mixup_prob: share of the batches that mixup or cutmix changes.
        mixup_switch_prob: share of these that cutmix changes, where both are used.
        random_erasing: share of the images of which a part is replaced by noise (Zhong et al., arXiv 1708.04896).
        label_smoothing: share of a label's weight that is spread over all classes.
        layer_decay: rate of a block over that of the block above it, for fine-tuning; null for equal rates.
        grad_checkpointing: compute blocks again in the backward pass: less memory, more time.
        backbone_options: further keywords for `timm.create_model`.
        lr: peak learning rate.
        weight_decay: AdamW's, on weights other than norms and biases.
        warmup_epochs: epochs, or a fraction of one, over which the rate rises from `warmup_lr` to `lr`.
        min_lr: the rate at the end.
        warmup_lr: the rate at the start.
        lr_batch: images a step for which the rates are meant; they are scaled to those of this run. null: as they are.

    Raises:
        ValueError: a model that timm does not know, weights that do not fit, numbers out of bounds.
    """

    monitor = "val/acc1"
    annotation = "class"

    def __init__(
        self,
        num_classes: int,
        class_names: list[str] | None = None,
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
        weight_decay: float = 0.05,
        warmup_epochs: float = 1.0,
        min_lr: float = 1e-6,
        warmup_lr: float = 0.0,
        lr_batch: int | None = None,
    ):
        super().__init__(num_classes, class_names, lr, weight_decay, warmup_epochs, min_lr, warmup_lr, lr_batch)
        # A checkpoint holds weights of its own: it must load where that file is not, and without the network.
        self.save_hyperparameters(ignore=["pretrained", "weights"])
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}, but there is nothing to tell apart with less than 2")
        shares = {
            "drop_path_rate": drop_path_rate, "mixup_prob": mixup_prob, "mixup_switch_prob": mixup_switch_prob,
            "random_erasing": random_erasing, "label_smoothing": label_smoothing,
            "layer_decay": 1.0 if layer_decay is None else layer_decay,
        }  # fmt: skip
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, but 0 to 1 is possible")
        if mixup < 0 or cutmix < 0:
            raise ValueError(f"mixup is {mixup} and cutmix {cutmix}, but both are 0 or more")
        if layer_decay == 0:
            raise ValueError("layer_decay is 0, which trains the head alone; null is for equal rates")
        if drop_path_rate and "drop_path_rate" in (backbone_options or {}):
            raise ValueError("drop_path_rate is in backbone_options as well; give it once")
        if drop_path_rate:
            backbone_options = {"drop_path_rate": drop_path_rate, **(backbone_options or {})}
        model: Any = build_classifier(backbone, num_classes, pretrained, weights, backbone_options or {})
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
        self.mean_loss = MeanMetric()  # Lightning's mean over processes cuts the number of images to a whole one each

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.layer_decay is None:
            return super().parameter_groups()
        spared = {name.removeprefix("model.") for name in self.no_weight_decay()}
        return param_groups_layer_decay(
            self.model, self.weight_decay, no_weight_decay_list=spared, layer_decay=self.layer_decay
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), uint8, or floating in 0..1 -> logits (B, num_classes)."""
        return self.model(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Normalized, in the precision of the network."""
        return self.normalize(to_dtype(images, torch.float32, scale=True)).to(self.dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        images = self.prepare(images)
        if self.random_erasing:
            images = RandomErasing(self.random_erasing, mode="pixel", device=images.device)(images)
        if self.mixup is not None:
            if len(images) % 2:
                raise ValueError(
                    f"mixup and cutmix pair images, but a batch has {len(images)}; use an even batch_size, "
                    "no larger than the training set of a device"
                )
            images, labels = self.mixup(images, labels)
        # On mixed labels (B, num_classes) as on plain ones, smoothing comes to what timm's losses do.
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
        """Probabilities (B, num_classes), of images in one tensor, or of a list of images in sizes of their own."""
        images = batch[0]
        logits = self(images) if isinstance(images, Tensor) else torch.cat([self(image[None]) for image in images])
        return logits.softmax(-1)


def build_classifier(
    name: str, num_classes: int, pretrained: bool, weights: str | None, options: dict[str, Any]
) -> nn.Module:
    """timm's model of this name, from scratch, from timm's weights, or from those of a file.

    Raises:
        ValueError: an unknown name, both kinds of weights, weights that do not fit.
    """
    check_model_name(name)
    if taken := sorted({"num_classes", "features_only", "pretrained", "checkpoint_path"} & options.keys()):
        raise ValueError(f"backbone_options name {', '.join(taken)}, which the task itself gives to timm")
    if weights is None:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    if pretrained:
        raise ValueError(f"pretrained is true and weights is {weights}: training can start from one of them")
    model: Any = timm.create_model(name, num_classes=num_classes, **options)
    state, heads = state_dict_and_classifiers(weights, model)
    load_matching_weights(model, state, weights, classifiers=heads)
    return model
