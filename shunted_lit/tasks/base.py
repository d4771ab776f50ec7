"""The base class of all tasks: settings, checks of data and checkpoints, seeds, optimizer."""

import os
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import timm
import torch
import torchvision
from timm.optim import param_groups_weight_decay

import shunted_lit
from shunted_lit.data.base import annotation_covers
from shunted_lit.tasks.nonfinite import StopOnNonfinite
from shunted_lit.tasks.optim import OptimizerConfig, configure_optimization, parameters_without_decay
from shunted_lit.utils.distributed import check_equal_on_all_ranks
from shunted_lit.utils.seeds import seed_step
from shunted_lit.utils.slices import Slices


def import_task_class(config: Any) -> type["BaseTask"]:
    """Import the task class that a config names by its `class_path`."""
    return pkgutil.resolve_name(config.class_path)


def required_annotation(config: Any) -> str | None:
    """Return the annotation that a task with this config (class_path and init_args) learns from; None for no config."""
    return import_task_class(config).required_annotation(config.init_args) if config else None


class BaseTask(StopOnNonfinite):
    """Base class of the tasks.

    A subclass sets the class attributes below and builds its network. All arguments of its constructor are saved as
    hyperparameters, so they must be primitive values: a checkpoint loads with `weights_only=True`.

    Attributes:
        monitor: Logged value that selects the best checkpoint; higher is better.
        annotation: What the task learns from, in the words of `BaseDataModule`; "" for anything.
        evaluation_settings: Names of the arguments that evaluation may change.
        takes_slices: Whether evaluation may cut images into slices.
        slices: How it cuts them; set by the data.

    Args:
        num_classes: Number of classes; labels start at 0.
        class_names: Names of the classes, for pictures and tables; null: their numbers.
        **optim: Settings of the optimizer, see `OptimizerConfig`.

    Raises:
        ValueError: The number of class names differs from `num_classes`, or a setting is out of range.
    """

    monitor: str
    annotation = ""
    evaluation_settings: tuple[str, ...] = ()
    takes_slices = False
    slices: Slices | None = None

    @classmethod
    def required_annotation(cls, options: Mapping[str, Any]) -> str:
        """Return the annotation that the task learns from when it is built with these arguments."""
        return cls.annotation

    def __init__(self, num_classes: int, class_names: Sequence[str] | None = None, **optim: Any):
        super().__init__()
        self.optim = OptimizerConfig(**optim)
        self.save_hyperparameters(asdict(self.optim))
        # All arguments of the subclass, but not where weights came from: a checkpoint must load without that file.
        self.save_hyperparameters(ignore=["pretrained", "weights"])
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"`class_names` must have `num_classes` ({num_classes}) names, got {len(class_names)}.")
        self.class_names = list(class_names or map(str, range(num_classes)))

    def check_data(self, data: Any) -> None:
        """Raise ValueError where a data module has other annotations than this task learns from."""
        given = getattr(data, "annotation", self.annotation)
        if self.annotation and not annotation_covers(given, self.annotation):
            offered = self.annotation in getattr(data, "offers", ())
            raise ValueError(
                f"{type(self).__name__} learns from {self.annotation}, but {type(data).__name__} has {given}; "
                + (f"set its annotation={self.annotation!r}." if offered else "choose other data.")
            )

    def setup(self, stage: str) -> None:
        self.is_tuning, self.was_tuned = stage == "fit", False
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "predict":
            self.check_data(data)
        self.slices = getattr(data, "slicing", None)
        if self.slices is not None and not self.takes_slices:
            raise ValueError(f"`data.slices` must be null for {type(self).__name__}: only detectors take slices.")
        versions = {
            package.__name__: package.__version__ for package in (shunted_lit, torch, torchvision, lightning, timm)
        }
        sizes = {f"images of {split}": len(dataset) for split, dataset in getattr(data, "datasets", {}).items()}
        check_equal_on_all_ranks({**versions, **sizes, "classes": self.class_names, "settings": dict(self.hparams)})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["task"] = type(self).__name__  # the file alone says what it is
        checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise ValueError where the checkpoint is of another task or of other classes."""
        own_task = type(self).__name__
        task, names = checkpoint.get("task", own_task), checkpoint.get("class_names", self.class_names)
        if task != own_task:
            raise ValueError(f"The checkpoint is of {task}, not of {own_task}.")
        if len(names) != len(self.class_names):
            raise ValueError(f"The checkpoint has {len(names)} classes, but the data have {len(self.class_names)}.")
        for label, (saved, current) in enumerate(zip(names, self.class_names, strict=True)):
            if saved != current:
                raise ValueError(f"Class {label} is {saved!r} in the checkpoint, but {current!r} in the data.")

    @property
    def lr(self) -> float:
        """Peak learning rate; Lightning's LR finder sets it."""
        return self.optim.peak_lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self.optim = self.optim.with_lr(lr)
        self.hparams.update(asdict(self.optim))

    def on_train_start(self) -> None:
        seed = getattr(getattr(self.trainer, "datamodule", None), "run_seed", None)
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**32)) if seed is None else seed
        self.was_tuned = self.is_tuning
        for optimizer in self.trainer.optimizers:  # `BaseFinetuning` leaves what a resumed run had unfrozen frozen
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.requires_grad_()

    def on_fit_start(self) -> None:
        """End the tuning: build optimizer and schedule for the learning rate and the batch size that were found."""
        self.is_tuning = False
        if self.was_tuned:
            self.trainer.should_stop = False
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Seed the step from run, epoch, step and rank, so that a resumed run draws the same random numbers."""
        seed_step(self.run_seed, self.current_epoch, batch_idx, self.global_rank)
        super().on_train_batch_start(batch, batch_idx)

    def draw(self, path: Path, samples: Sequence[Any]) -> None:
        """Save a picture of samples of a data set with predictions and ground truth."""
        raise NotImplementedError(f"{type(self).__name__} draws nothing.")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups of the trainable parameters, with `lr_scale` where learning rates differ."""
        names = parameters_without_decay(self)
        return param_groups_weight_decay(self, self.optim.decay, no_weight_decay_list=names)

    def configure_optimizers(self) -> Any:
        return configure_optimization(self.optim, self.parameter_groups, self.trainer)
