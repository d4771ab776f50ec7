"""AdamW with a linear warm-up and a learning rate schedule, both by the step."""

import bisect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from shunted_lit.utils.checks import check_choice, check_minimum, check_positive

# Decay from 1 to 0 after the warm-up: functions of the progress, from 0 to 1, and of `power`.
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "poly": lambda progress, power: (1 - progress) ** power,
    "constant": lambda progress, power: 1.0,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW and of its learning rate schedule.

    Args:
        lr: Peak learning rate.
        weight_decay: Weight decay of AdamW, on all parameters but norms and biases.
        warmup_epochs: Epochs, or a fraction of one, over which the learning rate rises from `warmup_lr` to `lr`.
        min_lr: Learning rate at the end of training.
        warmup_lr: Learning rate at the start of the warm-up.
        lr_batch: Effective batch size that the learning rates are meant for: they are scaled linearly to that of the
            run (Goyal et al., arXiv 1706.02677). null: not scaled.
        schedule: Decay after the warm-up: "cosine", "poly", which is (1 - progress) ** power, or "constant".
        power: Exponent of "poly".
        milestones: Epochs at whose start the learning rate is divided by 10.

    Raises:
        ValueError: A setting is out of range.
    """

    lr: float = 1e-4
    weight_decay: float = 0.05
    warmup_epochs: float = 0.5
    min_lr: float = 1e-6
    warmup_lr: float = 0.0
    lr_batch: int | None = None
    schedule: str = "cosine"
    power: float = 0.9
    milestones: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("schedule", self.schedule, SCHEDULES)
        check_positive(lr=self.lr, power=self.power)
        check_minimum(0, weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs)
        check_minimum(1, lr_batch=self.lr_batch)
        for name, value in {"min_lr": self.min_lr, "warmup_lr": self.warmup_lr}.items():
            if not 0 <= value <= self.lr:
                raise ValueError(f"`{name}` must be between 0 and `lr` ({self.lr:g}), got {value}.")
        if list(self.milestones) != sorted(self.milestones) or any(epoch <= 0 for epoch in self.milestones):
            raise ValueError(f"`milestones` must be increasing epochs above 0, got {self.milestones}.")

    def lr_factors(self, total_steps: int, steps_per_epoch: float) -> Callable[[int], float]:
        """Return a function from a step to its learning rate, as a fraction of the peak."""
        warmup_steps = min(int(self.warmup_epochs * steps_per_epoch), total_steps - 1)
        first, last = self.warmup_lr / self.lr, self.min_lr / self.lr
        milestones = [epoch * steps_per_epoch for epoch in self.milestones]

        def lr_factor(step: int) -> float:
            if step < warmup_steps:
                return first + (1 - first) * (step + 1) / (warmup_steps + 1)
            progress = min((step - warmup_steps) / (total_steps - warmup_steps), 1.0)
            decay = SCHEDULES[self.schedule](progress, self.power)
            return (last + (1 - last) * decay) * 0.1 ** bisect.bisect_right(milestones, step)

        return lr_factor


class ResumableLambdaLR(LambdaLR):
    """LambdaLR that keeps the learning rates of the current settings when it loads a checkpoint.

    A run resumed with more epochs or another batch size follows its own schedule, not that of its checkpoint.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        base_lrs = self.base_lrs
        super().load_state_dict(state_dict)  # holds no functions
        self.base_lrs = base_lrs
        for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = lr, lr * factor(self.last_epoch)


def scaled_lr(config: OptimizerConfig, trainer: Trainer) -> float:
    """Return the peak learning rate for the effective batch size of a run."""
    if config.lr_batch is None:
        return config.lr
    per_device: int = trainer.train_dataloader.batch_size  # type: ignore[union-attr]
    batch = per_device * trainer.accumulate_grad_batches * trainer.world_size
    factor = batch / config.lr_batch
    lr = config.lr * factor
    rank_zero_info(f"effective batch size {batch}: the learning rate is {config.lr:g} x {factor:g} = {lr:g}")
    return lr


def parameters_without_decay(model: nn.Module) -> set[str]:
    """Return the names of parameters that the `no_weight_decay` methods of submodules exclude from weight decay."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if module is not model and callable(no_weight_decay := getattr(module, "no_weight_decay", None)):
            names.update(f"{prefix}.{name}" for name in no_weight_decay())
    return names


def configure_adamw(config: OptimizerConfig, groups: list[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    """Return optimizer and scheduler as Lightning's `configure_optimizers` does.

    Args:
        config: Settings.
        groups: Parameter groups with their `weight_decay`, and `lr_scale` where learning rates differ.
        trainer: The trainer of the run; its `max_epochs` or `max_steps` sets the length of the schedule.

    Raises:
        ValueError: There is no training batch, or training has no end.
    """
    trainer.fit_loop.setup_data()  # Lightning does it later where max_epochs is not given
    if trainer.num_training_batches in (0, float("inf")):  # the latter where limit_train_batches is 0
        raise ValueError("There is no training batch: raise `limit_train_batches`, or use more images.")
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("Training has no end, so the learning rate has no schedule: set --trainer.max_epochs.")
    total_steps = max(int(total), 1)
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if config.milestones and config.milestones[-1] * steps_per_epoch >= total_steps:
        epochs = total_steps / steps_per_epoch
        rank_zero_info(f"training ends after {epochs:g} epochs, before the last of the milestones {config.milestones}")
    lr = scaled_lr(config, trainer)
    # Lightning clips no gradients of a fused optimizer in mixed precision.
    fused = "mixed" not in str(trainer.precision)
    optimizer = AdamW([{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups], lr=lr, fused=fused)
    scheduler = ResumableLambdaLR(optimizer, config.lr_factors(total_steps, steps_per_epoch))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
