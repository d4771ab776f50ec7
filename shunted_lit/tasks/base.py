"""What all tasks share: optimizer, schedule, names of the classes."""

import bisect
import importlib
import inspect
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torchvision
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from timm.optim import param_groups_weight_decay
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import shunted_lit
from shunted_lit.data.base import annotation_covers
from shunted_lit.models.weights import flatten, load_matching_weights, read_checkpoint
from shunted_lit.utils.distributed import check_equal_on_all_ranks
from shunted_lit.utils.seeds import seed_step

log = logging.getLogger(__name__)

LEAST_SCALE = 2.0**-10  # of the loss in float16, which begins at 2 ** 16 and is halved where a step overflows


def class_of(config: Any) -> type["BaseTask"]:
    """The task that a config, of class_path and init_args, names."""
    module, _, name = config.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def annotation_for(config: Any) -> str | None:
    """What data have to come with for a task as configured; None for no task."""
    return class_of(config).annotation_for(config.init_args) if config else None


class Schedule(LambdaLR):
    """A run resumed with more epochs, or larger batches, follows its own schedule, not that of its checkpoint."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        base_lrs = self.base_lrs
        super().load_state_dict(state_dict)  # functions are not in it
        self.base_lrs = base_lrs
        for group, lr, factor in zip(self.optimizer.param_groups, base_lrs, self.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = lr, lr * factor(self.last_epoch)


# After the warm-up, by name: the share of (rate - min_lr) that is left, from the share of the steps done and `power`.
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "cosine": lambda done, power: (1 + math.cos(math.pi * done)) / 2,
    "poly": lambda done, power: (1 - done) ** power,
    "constant": lambda done, power: 1.0,
}


class BaseTask(LightningModule):
    """AdamW without decay on norms and biases; linear warm-up, then a schedule, both by the step.

    A subclass names in `monitor` the logged value that tells its best checkpoint, in `annotation` what it learns from
    (the words of `BaseDataModule`), in `adjustable` the arguments that evaluation may set anew, calls
    `save_hyperparameters` (only primitive ones: a checkpoint must load with `weights_only=True`), and builds its
    network.

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
        schedule: "cosine", "poly" (falls as (1 - share of the steps) ** power) or "constant".
        power: of "poly".
        milestones: epochs at whose start the rate is divided by 10.

    Raises:
        ValueError: class names that are not `num_classes`, a rate or a time that is too small.
    """

    monitor: str
    annotation = ""  # whatever the data come with
    adjustable: tuple[str, ...] = ()  # arguments that evaluation may set anew

    @classmethod
    def annotation_for(cls, options: Mapping[str, Any]) -> str:
        """What a task with these arguments learns from."""
        return cls.annotation

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
        schedule: str = "cosine",
        power: float = 0.9,
        milestones: Sequence[float] = (),
    ):
        super().__init__()
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; choose one of {', '.join(sorted(SCHEDULES))}")
        if list(milestones) != sorted(milestones) or any(epoch <= 0 for epoch in milestones):
            raise ValueError(f"milestones are {list(milestones)}, but rising numbers of epochs, above 0, are needed")
        bounds = {
            "lr": (lr > 0, "above 0"),
            "weight_decay": (weight_decay >= 0, "0 or more"),
            "warmup_epochs": (warmup_epochs >= 0, "0 or more"),
            "min_lr": (0 <= min_lr <= lr, f"0 to lr, {lr:g}"),
            "warmup_lr": (0 <= warmup_lr <= lr, f"0 to lr, {lr:g}"),
            "lr_batch": (lr_batch is None or lr_batch > 0, "1 or more"),
            "power": (power > 0, "above 0"),
        }
        for name, (within, rule) in bounds.items():
            if not within:
                raise ValueError(f"{name} is {locals()[name]}, but {rule} is needed")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"class_names has {len(class_names)} names, but num_classes is {num_classes}")
        self.class_names = list(class_names or map(str, range(num_classes)))
        self.lr, self.weight_decay, self.warmup_epochs, self.min_lr = lr, weight_decay, warmup_epochs, min_lr
        self.warmup_lr, self.lr_batch = warmup_lr, lr_batch
        self.schedule, self.power, self.milestones = schedule, power, list(milestones)

    def whole(self, weights: str | None, pretrained: bool, network: str) -> dict[str, Any] | None:
        """Content of `weights` where it has a network of this task, not a backbone alone.

        Args:
            weights: the file, if any.
            pretrained: whether timm's weights are asked for as well.
            network: name of the network in the task.

        Raises:
            ValueError: a file that can't be read; two things to start from.
        """
        content = {} if weights is None else read_checkpoint(weights)
        if not any(name.startswith(f"{network}.") for name in flatten(content)):
            return None
        if pretrained:
            raise ValueError(f"pretrained is true and weights is {weights}: training can start from one of them")
        return content

    def start_from(
        self, content: Mapping[str, Any], source: str, classifiers: Sequence[str], optional: Sequence[str]
    ) -> None:
        """Takes the weights of a run of this task, or of what else has them under its names.

        Args:
            content: of the checkpoint.
            source: its file.
            classifiers: names of the layers that are of a number of classes.
            optional: names of parts that the file may lack.

        Raises:
            ValueError: weights that do not fit, and the settings in which the runs differ.
        """
        try:
            load_matching_weights(self, flatten(content), source, classifiers=classifiers, optional=optional)
        except ValueError as error:
            there, here = content.get("hyper_parameters", {}), self.hparams
            build = set(here) & set(there) - set(inspect.signature(BaseTask.__init__).parameters)
            differ = [f"{name} {there[name]!r} there, {here[name]!r} here" for name in sorted(build)
                      if there[name] != here[name] and name not in self.adjustable]  # fmt: skip
            told = f" Settings that differ: {'; '.join(differ)}" if differ else ""
            raise ValueError(f"{error}{told}") from None
        names = content.get("class_names", self.class_names)
        if len(names) == len(self.class_names) and names != self.class_names:
            first = next(i for i, pair in enumerate(zip(names, self.class_names, strict=True)) if len(set(pair)) > 1)
            log.warning("%s: class %d is %r there and %r here; classes start from those of their number",
                        source, first, names[first], self.class_names[first])  # fmt: skip

    def check_data(self, data: Any) -> None:
        """Raises ValueError where a data module comes with something else than this task learns from."""
        given = getattr(data, "annotation", self.annotation)
        if self.annotation and not annotation_covers(given, self.annotation):
            offers = self.annotation in getattr(data, "offers", ())
            raise ValueError(
                f"{type(self).__name__} learns from {self.annotation}, but {type(data).__name__} has {given}; "
                + (f"give it annotation={self.annotation!r}" if offers else "choose other data")
            )

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            self.check_data(data)
        versions = {
            package.__name__: package.__version__ for package in (shunted_lit, torch, torchvision, lightning, timm)
        }
        sizes = {f"images of {split}": len(dataset) for split, dataset in getattr(data, "datasets", {}).items()}
        check_equal_on_all_ranks({**versions, **sizes, "classes": self.class_names, "settings": dict(self.hparams)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = type(self).__name__  # so that a file alone tells what it is
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where the checkpoint is of another task, or of other classes."""
        task, names = checkpoint.get("task", type(self).__name__), checkpoint.get("class_names", self.class_names)
        if task != type(self).__name__:
            raise ValueError(f"the checkpoint is of {task}, not of {type(self).__name__}")
        if len(names) != len(self.class_names):
            raise ValueError(f"the checkpoint has {len(names)} classes, but the data have {len(self.class_names)}")
        for label, (theirs, ours) in enumerate(zip(names, self.class_names, strict=True)):
            if theirs != ours:
                raise ValueError(f"class {label} is {theirs!r} in the checkpoint, but {ours!r} in the data")

    def on_fit_start(self) -> None:
        seed = getattr(getattr(self.trainer, "datamodule", None), "run_seed", None)
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32)) if seed is None else seed

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Random numbers of a step follow from the run's seed and the step, so that a resumed run has the same; each
        rank has its own, once all have the same network."""
        seed_step(self.run_seed, self.current_epoch, batch_idx, self.global_rank)
        self.batch = (batch_idx, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch = (batch_idx, None)  # two of them would not have to fit into a device's memory

    def on_before_backward(self, loss: Tensor) -> None:
        """Raises ValueError where the loss is no number; with several ranks, the gradients tell all of them at once."""
        if not self.has_scaler() and self.trainer.world_size == 1 and not torch.isfinite(loss):
            self.stop_on(f"the loss is {float(loss.detach())}")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Raises ValueError where the gradients are no numbers: no step is taken, and no checkpoint has it."""
        if self.has_scaler():  # float16 may overflow: its scaler leaves such a step out and scales down
            scale = self.trainer.precision_plugin.scaler.get_scale()  # type: ignore[attr-defined]
            if scale < LEAST_SCALE:
                self.stop_on(f"float16 overflows at a loss scale of {scale:g} still")
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            self.stop_on(f"the norm of the gradients is {float(norm)}")

    def has_scaler(self) -> bool:
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def stop_on(self, what: str) -> None:
        """Saves the batch and raises ValueError: the step, its rate, its images, and where they are kept."""
        batch_idx, batch = self.batch
        data: Any = getattr(self.trainer, "datamodule", None)
        names = data.names_of(self.current_epoch, batch_idx) if hasattr(data, "names_of") else []
        rates = sorted({group["lr"] for group in self.trainer.optimizers[0].param_groups})
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        file = folder / f"nonfinite_rank_{self.global_rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"batch": batch, "batch_idx": batch_idx, "epoch": self.current_epoch, "names": names}, file)
        told = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(
            f"{what} in step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}; learning rate "
            f"{', '.join(f'{rate:g}' for rate in rates)}; images: {told or 'unknown'}). {file} holds the batch, "
            "torch.load reads it; a lower rate, a longer warm-up or gradient_clip_val may help"
        )

    def draw(self, path: Path, samples: Sequence[Any]) -> None:
        """Writes a picture of what is predicted for samples of a data set, beside their truth."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What trains, for the optimizer: groups with their `weight_decay`, and `lr_scale` where rates differ."""
        return param_groups_weight_decay(self, self.weight_decay, no_weight_decay_list=self.no_weight_decay())

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the networks in here want without decay, besides those of one dimension."""
        names: set[str] = set()
        for prefix, module in self.named_modules():
            if module is not self and callable(wish := getattr(module, "no_weight_decay", None)):
                names.update(f"{prefix}.{name}" for name in wish())
        return names

    def lr_factor(self) -> float:
        """How many times `lr_batch` a step has images over all devices; 1 where rates are not to be scaled."""
        if self.lr_batch is None:
            return 1.0
        images: int = self.trainer.train_dataloader.batch_size  # type: ignore[union-attr]
        batch = images * self.trainer.accumulate_grad_batches * self.trainer.world_size
        factor = batch / self.lr_batch
        rank_zero_info(f"{batch} images a step: the learning rate is {self.lr:g} x {factor:g} = {self.lr * factor:g}")
        return factor

    def configure_optimizers(self) -> Any:
        """Over the parameters that train; `--trainer.max_epochs` or `max_steps` sets the schedule's length."""
        self.trainer.fit_loop.setup_data()  # which Lightning leaves for later where max_epochs is not given
        if self.trainer.num_training_batches in (0, float("inf")):  # the latter where limit_train_batches is 0
            raise ValueError("there is no training batch: limit_train_batches leaves none, or there are too few images")
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ValueError("training has no end, so the learning rate has no schedule: set --trainer.max_epochs")
        total = max(int(total), 1)
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        warmup = min(int(self.warmup_epochs * per_epoch), total - 1)
        first, lowest = self.warmup_lr / self.lr, self.min_lr / self.lr
        falls = [epoch * per_epoch for epoch in self.milestones]
        if falls and falls[-1] >= total:
            rank_zero_info(f"training ends after {total / per_epoch:g} epochs, before all milestones {self.milestones}")

        def factor(step: int) -> float:
            if step < warmup:
                return first + (1 - first) * (step + 1) / (warmup + 1)
            left = SCHEDULES[self.schedule](min((step - warmup) / (total - warmup), 1.0), self.power)
            return (lowest + (1 - lowest) * left) * 0.1 ** bisect.bisect_right(falls, step)

        lr = self.lr * self.lr_factor()
        groups = [{**group, "lr": lr * group.get("lr_scale", 1.0)} for group in self.parameter_groups()]
        # Lightning clips no gradients of a fused optimizer in mixed precision.
        fused = "mixed" not in str(self.trainer.precision)
        optimizer = AdamW(groups, lr=lr, fused=fused)
        scheduler = Schedule(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
