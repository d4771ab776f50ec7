"""What a run prints before and while it works: its data, model and folder, and a progress bar."""

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, Timer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

SPLITS = {"train": "training ", "val": "validation ", "predict": ""}


class RunSummary(Callback):
    """Print what a run found and where its results go: data, model, folder."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        log_dir = trainer.log_dir if trainer.loggers else None  # a broadcast: all ranks must take part
        if not trainer.is_global_zero:
            return
        lines = {"data": describe_data(getattr(trainer, "datamodule", None)), "model": describe_model(pl_module)}
        if log_dir and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            lines["results"] = log_dir
        for name, line in lines.items():
            if line:
                print(f"{name:7}  {line}", flush=True)


def describe_data(data: Any) -> str:
    """Return the class of a data module, its classes, and the number of images and objects of each split."""
    datasets: dict[str, Any] = getattr(data, "datasets", {})
    if not datasets:
        return type(data).__name__ if data else ""
    sizes = []
    for split, dataset in datasets.items():
        objects = f" with {count(dataset.count_objects(), 'object')}" if hasattr(dataset, "count_objects") else ""
        sizes.append(count(len(dataset), f"{SPLITS.get(split, f'{split} ')}image") + objects)
    classes = [] if "predict" in datasets else [describe_classes(data.class_names)]
    return f"{type(data).__name__}: {', '.join([*classes, *sizes])}"


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_classes(names: list[str]) -> str:
    noun = "class" if len(names) == 1 else "classes"
    return f"{len(names)} {noun} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def describe_model(module: LightningModule) -> str:
    """Return the class of a task, the parts of its network, and its number of parameters."""
    settings = module.hparams
    parts = [str(settings[name]) for name in ("detector", "decoder", "backbone") if settings.get(name)]
    if settings.get("neck") is not None:
        form, levels = settings["neck"].get("form", "reference"), ", ".join(map(str, settings["neck_levels"]))
        kinds = {"reference": "neck on level", "light": "light neck on level", "pyramid": "neck across levels"}
        parts.append(f"{kinds[form]} {levels}")
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    share = "all trainable" if trainable == total else f"{trainable / 1e6:.1f} M trainable"
    network = f" ({', '.join(parts)})" if parts else ""
    return f"{type(module).__name__}{network}: {total / 1e6:.1f} M parameters, {share}"


class RunProgressBar(RichProgressBar):
    """Progress bar with the loss, the score, images/s, and the time left until the end of the run.

    Where the output is no terminal, a line for each epoch takes the place of the bar.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=4)
        console = Console()
        self.has_terminal = console.is_terminal or console.is_jupyter
        if not self.has_terminal:
            self.disable()
        self.start_time = self.epoch_time = self.train_time = 0.0
        self.start_step = self.batches = 0
        self.steps = float("inf")

    def enable(self) -> None:
        if self.has_terminal:  # the learning rate finder calls this
            super().enable()

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        bar_and_batches = super().configure_columns(trainer)[:3]
        return [*bar_and_batches, SpeedColumn(trainer), TimeLeftColumn(self)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the values that the task logs for the bar, by the last part of their names, without `v_num`."""
        shown: dict[str, Any] = {}
        for name, value in super().get_metrics(trainer, pl_module).items():
            short = name.rpartition("/")[2]
            shown[name if short in shown else short] = value
        shown.pop("v_num", None)
        return shown

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start_time, self.start_step = time.monotonic(), trainer.global_step
        self.steps = trainer.estimated_stepping_batches
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch_time, self.batches = time.monotonic(), 0
        super().on_train_epoch_start(trainer, pl_module)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=describe_epoch(trainer))

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.batches, self.train_time = self.batches + 1, time.monotonic()
        super().on_train_batch_end(trainer, *args, **kwargs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.has_terminal or not trainer.is_global_zero:
            return
        values = [f"{name} {float(value):.3f}" for name, value in self.get_metrics(trainer, pl_module).items()]
        speed = format_speed(trainer, self.batches / max(self.train_time - self.epoch_time, 1e-9))
        line = [describe_epoch(trainer), *values, speed, format_time_left(self.time_left())]
        print(", ".join(line), flush=True)

    def time_left(self) -> float | None:
        """Return the seconds until the end of training, validation included; None if unknown."""
        done = self.trainer.global_step - self.start_step
        elapsed = time.monotonic() - self.start_time
        left = [elapsed / done * (self.steps - self.trainer.global_step)] if done else []
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer) and (remaining := callback.time_remaining()) is not None:
                left.append(remaining)
        return min(left, default=None)

    # The bar ends before the table of scores is printed.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.stop()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_end(trainer, pl_module)
        self.stop()

    def stop(self) -> None:
        """End the updates of the bar; its last state stays on the screen."""
        if self.progress is not None:
            self.progress.stop()


class SpeedColumn(ProgressColumn):
    """Images per second."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        super().__init__()

    def render(self, task: Task) -> Text:
        return Text(format_speed(self.trainer, task.speed) if task.speed else "", style="dim")


class TimeLeftColumn(ProgressColumn):
    """Time left until the end of the training, or of the evaluation."""

    max_refresh = 0.5

    def __init__(self, bar: RunProgressBar):
        self.bar = bar
        super().__init__()

    def render(self, task: Task) -> Text:
        is_training = task.id == self.bar.train_progress_bar_id
        return Text(format_time_left(self.bar.time_left() if is_training else task.time_remaining), style="dim")


def describe_epoch(trainer: Trainer) -> str:
    """Return the number of the current epoch from 1, and that of the last one."""
    last = f"/{trainer.max_epochs}" if (trainer.max_epochs or 0) > 0 else ""
    return f"Epoch {trainer.current_epoch + 1}{last}"


def format_speed(trainer: Trainer, batches: float) -> str:
    """Format a number of batches per second of this process as images per second of all processes."""
    batch_size = getattr(getattr(trainer, "datamodule", None), "batch_size", None)
    speed, unit = (batches * batch_size * trainer.world_size, "images/s") if batch_size else (batches, "batches/s")
    return f"{speed:.{0 if speed >= 10 else 1}f} {unit}"


def format_time_left(seconds: float | None) -> str:
    if seconds is None or seconds == float("inf"):
        return "-:--:-- left"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"
