"""What all tasks share: optimizer, schedule, names of the classes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.optim import param_groups_weight_decay
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


class BaseTask(LightningModule):
    """AdamW without decay on norms and biases; linear warm-up, then cosine, both by the step.

    A subclass names in `monitor` the logged value that tells its best checkpoint, calls `save_hyperparameters` (only
    primitive ones: a checkpoint must load with `weights_only=True`), and builds its network.

    Args:
        num_classes: number of classes; labels run from 0.
        class_names: a name for each, for pictures and tables; numbers where None.
        lr: peak learning rate.
        weight_decay: AdamW's.
        warmup_epochs: epochs, or a fraction of one, over which the rate rises from `warmup_lr` to `lr`.
        min_lr: the rate at the end.
        warmup_lr: the rate at the start.
        lr_batch: where given, the three rates are meant for a step of so many images, and scaled to the images that
            a step has over all devices (linear scaling, Goyal et al., arXiv 1706.02677).

    Raises:
        ValueError: class names that are not `num_classes`, a rate or a time that is too small.
    """

    monitor: str

    def __init__(
        self,
        num_classes: int,
        class_names: Sequence[str] | None,
        lr: float,
        weight_decay: float,
        warmup_epochs: float,
        min_lr: float,
        warmup_lr: float = 0.0,
        lr_batch: int | None = None,
    ):
        super().__init__()
        bounds = {
            "lr": lr > 0,
            "warmup_epochs": warmup_epochs >= 0,
            "warmup_lr": 0 <= warmup_lr <= lr,
            "lr_batch": lr_batch is None or lr_batch > 0,
        }
        for name, within in bounds.items():
            if not within:
                raise ValueError(f"{name} is {locals()[name]}, which is out of bounds")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.lr, self.weight_decay, self.warmup_epochs, self.min_lr = lr, weight_decay, warmup_epochs, min_lr
        self.warmup_lr, self.lr_batch = warmup_lr, lr_batch

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = type(self).__name__  # so that a file alone tells what it is

    def draw(self, path: Path, samples: Sequence[Any]) -> None:
        """Writes a picture of what is predicted for samples of a data set, beside their truth."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, for the optimizer: groups with their `weight_decay`, and `lr_scale` where rates differ."""
        return param_groups_weight_decay(self, self.weight_decay)

    def lr_factor(self) -> float:
        """How many times `lr_batch` a step has images over all devices; 1 where rates are not to be scaled."""
        if self.lr_batch is None:
            return 1.0
        images = getattr(self.trainer.train_dataloader, "batch_size", 1)
        batch = images * self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = batch / self.lr_batch
        rank_zero_info(f"{batch} images a step: the learning rate is {self.lr:g} x {factor:g} = {self.lr * factor:g}")
        return factor

    def configure_optimizers(self) -> Any:
        """Over the parameters that train; `--trainer.max_epochs` or `max_steps` sets the schedule's length."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("training has no end, so the learning rate has no schedule: set --trainer.max_epochs")
        total = max(int(total), 1)
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(int(self.warmup_epochs * per_epoch), total - 1)
        first, lowest = self.warmup_lr / self.lr, self.min_lr / self.lr

        def factor(step: int) -> float:
            if step < warmup:
                return first + (1 - first) * (step + 1) / (warmup + 1)
            progress = min((step - warmup) / (total - warmup), 1.0)
            return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

        lr = self.lr * self.lr_factor()
        groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in self.parameter_groups()]
        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = AdamW(groups, lr=lr, fused=fused)
        # A function is not kept in checkpoints: a run resumed with more epochs follows its own, longer schedule.
        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
