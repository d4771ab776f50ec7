"""What all tasks share: optimizer, schedule, names of the classes."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
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
        warmup_epochs: epochs, or a fraction of one, over which the rate rises to `lr`.
        min_lr: the rate at the end.

    Raises:
        ValueError: class names that are not `num_classes`.
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
    ):
        super().__init__()
        for name, value, bound in (("lr", lr, lr > 0), ("warmup_epochs", warmup_epochs, warmup_epochs >= 0)):
            if not bound:
                raise ValueError(f"{name} is {value}, which is too small")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.lr, self.weight_decay, self.warmup_epochs, self.min_lr = lr, weight_decay, warmup_epochs, min_lr

    def configure_optimizers(self) -> Any:
        """Over the parameters that train; `--trainer.max_epochs` or `max_steps` sets the schedule's length."""
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("training has no end, so the learning rate has no schedule: set --trainer.max_epochs")
        total = max(int(total), 1)
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(int(self.warmup_epochs * per_epoch), total - 1)
        lowest = self.min_lr / self.lr

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / (warmup + 1)
            progress = min((step - warmup) / (total - warmup), 1.0)
            return lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2

        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = AdamW(param_groups_weight_decay(self, self.weight_decay), lr=self.lr, fused=fused)
        # A function is not kept in checkpoints: a run resumed with more epochs follows its own, longer schedule.
        scheduler = LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
