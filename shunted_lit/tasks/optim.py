"""AdamW with a linear warm-up and a schedule, both by the step; or an optimizer and a scheduler of the user."""

import bisect
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from shunted_lit.utils.checks import check_choice, check_minimum, check_positive

# Decay from 1 to 0 after the warm-up: functions of the progress, from 0 to 1, and of `power`.
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": lambda progress, power: (1 + math.cos(math.pi * progress)) / 2,
    "poly": lambda progress, power: (1 - progress) ** power,
    "constant": lambda progress, power: 1.0,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer and of its learning rate schedule.

    `optimizer` and `lr_scheduler` name a class and its arguments: `{"class_path": "torch.optim.SGD", "init_args":
    {"momentum": 0.9}}`. In a config and on the command line they are given at the top level, as LightningCLI has them.

    Args:
        lr: Peak learning rate; that of `optimizer` replaces it.
        weight_decay: Weight decay, on all parameters but norms and biases; that of `optimizer` replaces it.
        warmup_epochs: Epochs, or a fraction of one, over which the learning rate rises from `warmup_lr` to `lr`.
        min_lr: Learning rate at the end of training.
        warmup_lr: Learning rate at the start of the warm-up.
        lr_batch: Effective batch size that the learning rates are meant for: they are scaled linearly to that of the
            run (Goyal et al., arXiv 1706.02677). null: not scaled.
        schedule: Decay after the warm-up: "cosine", "poly", which is (1 - progress) ** power, or "constant".
        power: Exponent of "poly".
        milestones: Epochs at whose start the learning rate is divided by 10.
        optimizer: Class of the optimizer and its arguments; null: AdamW.
        lr_scheduler: Class of a scheduler and its arguments, instead of warm-up and `schedule`. It steps once an epoch;
            OneCycleLR and CyclicLR step once an optimizer step. null: warm-up and `schedule`.

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
    optimizer: dict[str, Any] | None = None
    lr_scheduler: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name, spec in {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}.items():
            check_class_spec(name, spec)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_positive(lr=self.peak_lr, power=self.power)
        check_minimum(0, weight_decay=self.decay, warmup_epochs=self.warmup_epochs)
        check_minimum(1, lr_batch=self.lr_batch)
        for name, value in {"min_lr": self.min_lr, "warmup_lr": self.warmup_lr}.items():
            if not 0 <= value <= self.peak_lr:
                raise ValueError(f"`{name}` must be between 0 and `lr` ({self.peak_lr:g}), got {value}.")
        if list(self.milestones) != sorted(self.milestones) or any(epoch <= 0 for epoch in self.milestones):
            raise ValueError(f"`milestones` must be increasing epochs above 0, got {self.milestones}.")

    def optimizer_argument(self, name: str, default: Any) -> Any:
        """Return an argument of `optimizer`; `default` where it has none, or null."""
        value = (self.optimizer or {}).get("init_args", {}).get(name)
        return default if value is None else value

    @property
    def peak_lr(self) -> float:
        return self.optimizer_argument("lr", self.lr)

    @property
    def decay(self) -> float:
        return self.optimizer_argument("weight_decay", self.weight_decay)

    def with_lr(self, lr: float) -> "OptimizerConfig":
        """Return these settings with another peak learning rate; lower rates that would exceed it."""
        optimizer = self.optimizer
        if optimizer is not None:
            optimizer = {**optimizer, "init_args": {**optimizer.get("init_args", {}), "lr": lr}}
        return replace(self, lr=lr, optimizer=optimizer, min_lr=min(self.min_lr, lr), warmup_lr=min(self.warmup_lr, lr))

    def lr_factors(self, total_steps: int, steps_per_epoch: float) -> Callable[[int], float]:
        """Return a function from a step to its learning rate, as a fraction of the peak."""
        warmup_steps = min(int(self.warmup_epochs * steps_per_epoch), total_steps - 1)
        first, last = self.warmup_lr / self.peak_lr, self.min_lr / self.peak_lr
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

    A run resumed with more epochs or another batch size follows its own schedule, not that of its checkpoint. Groups
    that are added in training, as by Lightning's `BaseFinetuning`, follow the schedule from their own learning rate.
    """

    def get_lr(self) -> list[Any]:
        lrs = super().get_lr()
        added = self.optimizer.param_groups[len(lrs) :]
        if not added:
            return lrs
        factor = self.lr_lambdas[0]
        before, now = factor(self.last_epoch - 1), factor(self.last_epoch)
        return [*lrs, *(group["lr"] * now / before if before else 0.0 for group in added)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        base_lrs = self.base_lrs
        super().load_state_dict(state_dict)  # holds no functions
        self.base_lrs = base_lrs
        for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.lr_lambdas, strict=False):
            group["initial_lr"], group["lr"] = lr, lr * factor(self.last_epoch)


def check_class_spec(name: str, spec: Any) -> None:
    """Raise ValueError unless `spec` is None or names a class by its import path."""
    if spec is None:
        return
    is_mapping = isinstance(spec, dict) and set(spec) <= {"class_path", "init_args"}
    if not is_mapping or not isinstance(spec.get("init_args", {}), dict):
        raise ValueError(f"`{name}` must be a mapping {{class_path: CLASS, init_args: {{...}}}}, got {spec!r}.")
    import_class(name, spec)


def import_class(name: str, spec: Mapping[str, Any]) -> Any:
    """Import the class that a setting names by its `class_path`."""
    path = str(spec.get("class_path"))
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        found = None
    base = {"optimizer": Optimizer, "lr_scheduler": LRScheduler}[name]
    if not (inspect.isclass(found) and issubclass(found, base)):
        example = {"optimizer": "torch.optim.SGD", "lr_scheduler": "torch.optim.lr_scheduler.StepLR"}[name]
        raise ValueError(
            f"`{name}.class_path` must be the import path of a subclass of {base.__name__}, such as {example}, got "
            f"{path!r}."
        )
    return found


def build(name: str, spec: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """Build the object that a setting names; `options` replace its `init_args`."""
    cls = import_class(name, spec)
    try:
        return cls(*args, **{**spec.get("init_args", {}), **options})
    except TypeError as error:
        raise ValueError(f"`{name}.init_args` must be arguments of {cls.__name__}: {error}.") from error


def scaled_lr(config: OptimizerConfig, trainer: Trainer) -> float:
    """Return the peak learning rate for the effective batch size of a run."""
    if config.lr_batch is None:
        return config.peak_lr
    per_device: int = trainer.train_dataloader.batch_size  # type: ignore[union-attr]
    batch = per_device * trainer.accumulate_grad_batches * trainer.world_size
    factor = batch / config.lr_batch
    lr = config.peak_lr * factor
    rank_zero_info(f"effective batch size {batch}: the learning rate is {config.peak_lr:g} x {factor:g} = {lr:g}")
    return lr


def parameters_without_decay(model: nn.Module) -> set[str]:
    """Return the names of parameters that the `no_weight_decay` methods of submodules exclude from weight decay."""
    names: set[str] = set()
    for prefix, module in model.named_modules():
        if module is not model and callable(no_weight_decay := getattr(module, "no_weight_decay", None)):
            names.update(f"{prefix}.{name}" for name in no_weight_decay())
    return names


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]], trainer: Trainer) -> Optimizer:
    """Build the optimizer of a run over parameter groups; see `configure_optimization`."""
    lr = scaled_lr(config, trainer)
    groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in groups]
    if config.optimizer is None:
        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused = "mixed" not in str(trainer.precision)
        return AdamW(groups, lr=lr, weight_decay=config.decay, fused=fused)
    cls = import_class("optimizer", config.optimizer)
    arguments = inspect.signature(cls).parameters
    if "lr" not in arguments:
        raise ValueError(
            f"`optimizer` must be a class with an argument `lr`, which the schedule sets, got {cls.__name__}; choose "
            "another class."
        )
    options = {"lr": lr, "weight_decay": config.decay}
    return build("optimizer", config.optimizer, groups, **{k: v for k, v in options.items() if k in arguments})


def build_scheduler(spec: Mapping[str, Any], optimizer: Optimizer, total_steps: int) -> dict[str, Any]:
    """Build a scheduler that a setting names, with its interval, as Lightning's `configure_optimizers` returns it."""
    cls, options = import_class("lr_scheduler", spec), spec.get("init_args", {})
    name, per_step = cls.__name__, issubclass(cls, (OneCycleLR, CyclicLR))
    if issubclass(cls, OneCycleLR):
        given = options.get("total_steps") or (options.get("epochs") or 0) * (options.get("steps_per_epoch") or 0)
        if given < total_steps:
            raise ValueError(
                f"`lr_scheduler.total_steps` of {name} must be at least the {total_steps} steps of this run, got "
                f"{given or None}; set --lr_scheduler.total_steps {total_steps}."
            )
    scales = [group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    rates = {key: options[key] for key in ("base_lr", "max_lr") if per_step and isinstance(options.get(key), float)}
    scheduler = build(
        "lr_scheduler", spec, optimizer, **{key: [lr * scale for scale in scales] for key, lr in rates.items()}
    )
    monitor = getattr(scheduler, "monitor", None)
    if isinstance(scheduler, ReduceLROnPlateau) and monitor is None:
        raise ValueError(
            f"`lr_scheduler` must name the score that {name} watches; use the class_path "
            "lightning.pytorch.cli.ReduceLROnPlateau with init_args such as {monitor: train/loss}."
        )
    return {"scheduler": scheduler, "interval": "step" if per_step else "epoch", "monitor": monitor}


def split_added_groups(optimizer: Optimizer, parameter_groups: Callable[[], list[dict[str, Any]]]) -> None:
    """Let parameters that are added in training, as by `BaseFinetuning`, get the groups that they have at the start.

    Args:
        optimizer: The optimizer; its method `add_param_group` is replaced.
        parameter_groups: Function that returns the groups of all trainable parameters.
    """
    add = optimizer.add_param_group

    def add_param_group(group: dict[str, Any]) -> None:
        new = {id(parameter): parameter for parameter in group["params"]}
        for part in parameter_groups():
            parameters = [new.pop(id(parameter)) for parameter in part["params"] if id(parameter) in new]
            lr = group.get("lr", optimizer.defaults["lr"]) * part.get("lr_scale", 1.0)
            if parameters:
                add({**part, **group, "params": parameters, "lr": lr})
        if new:
            add({**group, "params": list(new.values())})

    optimizer.add_param_group = add_param_group  # type: ignore[assignment, method-assign]


def configure_optimization(
    config: OptimizerConfig, parameter_groups: Callable[[], list[dict[str, Any]]], trainer: Trainer
) -> dict[str, Any]:
    """Return optimizer and scheduler as Lightning's `configure_optimizers` does.

    Args:
        config: Settings.
        parameter_groups: Function that returns the groups of the trainable parameters with their `weight_decay`, and
            `lr_scale` where learning rates differ.
        trainer: The trainer of the run; its `max_epochs` or `max_steps` sets the length of the schedule.

    Raises:
        ValueError: There is no training batch, training has no end, or optimizer and scheduler cannot be built.
    """
    trainer.fit_loop.setup_data()  # Lightning does it later where max_epochs is not given
    if trainer.num_training_batches in (0, float("inf")):  # the latter where limit_train_batches is 0
        raise ValueError("There is no training batch: raise `limit_train_batches`, or use more images.")
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("Training has no end, so the learning rate has no schedule: set --trainer.max_epochs.")
    total_steps = max(int(total), 1)
    optimizer = build_optimizer(config, parameter_groups(), trainer)
    split_added_groups(optimizer, parameter_groups)
    if config.lr_scheduler is not None:
        return {"optimizer": optimizer, "lr_scheduler": build_scheduler(config.lr_scheduler, optimizer, total_steps)}
    steps_per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    if config.milestones and config.milestones[-1] * steps_per_epoch >= total_steps:
        epochs = total_steps / steps_per_epoch
        rank_zero_info(f"training ends after {epochs:g} epochs, before the last of the milestones {config.milestones}")
    scheduler = ResumableLambdaLR(optimizer, config.lr_factors(total_steps, steps_per_epoch))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
