"""Checkpoints that are whole at any moment, and a stop that loses nothing."""

import csv
import io
import logging
import os
import re
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

log = logging.getLogger(__name__)

LAST = "checkpoints/last.ckpt"  # in the folder of a run


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place of a checkpoint and then moves it there: what stands there is whole, however a run ends.

    Raises:
        OSError: a file that can't be written, naming it; the one before it is as it was.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch's own writer to a file does not say why it failed
        torch.save(checkpoint, content)
        part = path.with_name(f".{path.name}.part")
        try:
            with part.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            kept = "the one before it is as it was" if path.is_file() else "there is none yet"
            raise OSError(
                f"{path}: a checkpoint of {content.tell() / 1e6:.0f} MB can't be written ({error.strerror}); {kept}"
            ) from error


def find_last_run(root: Path) -> Path | None:
    """Folder of the newest training run below a root; None where there is none."""
    runs = [
        path.parent
        for path in root.glob("version_*/checkpoints")
        if path.parent.name.removeprefix("version_").isdecimal()
    ]
    return max(runs, key=run_version, default=None)


def run_version(run: Path) -> int:
    """Number of a run, from its folder version_N."""
    return int(run.name.removeprefix("version_"))


class RunLogger(CSVLogger):
    """Lightning's, each row on disk at once, and none twice.

    Args:
        root: folder of the runs.
        version: number of this one.
        step: where a run goes on in its folder, the number of steps it has; later rows of metrics.csv are made anew.
    """

    def __init__(self, root: Path, version: int | None, step: int | None = None):
        super().__init__(root, name="", version=version, flush_logs_every_n_steps=1)
        self.last_row: Any = None
        if step is not None:
            self.keep_rows(Path(self.log_dir), step)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """As Lightning's, but for a row that was just written: `RunCheckpoint` writes ahead."""
        row = (step, dict(metrics))
        if row != self.last_row:
            self.last_row = row
            super().log_metrics(metrics, step)

    @rank_zero_only
    def keep_rows(self, folder: Path, step: int) -> None:
        file, before = folder / "metrics.csv", folder / ".metrics.csv.before"
        if file.is_file() and not before.is_file():  # which a run that was cut off just here has left
            file.replace(before)
        if before.is_file():
            with before.open(newline="", encoding="utf-8") as lines:
                rows = [row for row in csv.DictReader(lines) if int(row["step"]) < step]
            for row in rows:
                found: Any = {name: value for name, value in row.items() if value}  # as text: it is written as it was
                self.experiment.log_metrics(found, int(row["step"]))
            self.save()
            before.unlink()


class Stopped(SystemExit):
    """A signal ended the run, with a checkpoint."""


class RunCheckpoint(ModelCheckpoint):
    """Lightning's, of the best, and last.ckpt: after each epoch and validation, every so often, and where a run stops.

    Ctrl-C and SIGTERM end a run after the step, or the validation, that it is in, with exit code 130 or 143; a second
    one ends it at once. A run that goes on from last.ckpt is the same as one that was never stopped.

    Args:
        last_every_n_steps: steps between two last.ckpt, besides those after epochs and validations; null for none.
        last_every_n_minutes: the same by time.
        save_last: whether to write last.ckpt at all.
        keywords: further ones of ModelCheckpoint.
    """

    def __init__(
        self,
        last_every_n_steps: int | None = None,
        last_every_n_minutes: float | None = 15,
        save_last: bool | None = True,
        **keywords: Any,
    ):
        super().__init__(save_last=None, **keywords)  # Lightning's own follows the best, and lags behind
        for name, value in (("steps", last_every_n_steps), ("minutes", last_every_n_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"checkpoint.last_every_n_{name} is {value}, but more than 0, or null, is needed")
        self.every_n_steps, self.every_n_minutes = last_every_n_steps, last_every_n_minutes
        self.saves_last = bool(save_last)
        self.saved_step, self.saved_time = 0, 0.0
        self.signal: int | None = None
        self.handlers: dict[int, Any] = {}  # those before ours

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if trainer.is_global_zero and self.saves_last and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(self.dirpath or "").mkdir(parents=True, exist_ok=True)  # by which `last_run` knows a training run
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As Lightning's; a best checkpoint of steps that are lost and will be done anew makes room for itself."""
        super().load_state_dict(state_dict)
        if self.dirpath != state_dict.get("dirpath", self.dirpath):
            return
        kept = {Path(path).name for path in self.best_k_models}
        for path in Path(self.dirpath or "").glob("*.ckpt"):
            if re.fullmatch(rf"{re.escape(str(self.filename))}(-v\d+)?\.ckpt", path.name) and path.name not in kept:
                path.unlink(missing_ok=True)  # another rank may have been faster

    def note(self, number: int, frame: Any) -> None:
        """Handler of the first signal."""
        self.signal = number
        self.give_back()
        log.warning("%s: the run stops after this step; once more to stop at once", signal.Signals(number).name)

    def give_back(self) -> None:
        """Signals go to those again that had them before."""
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    # Before Lightning gives back its own, which would else stay in force, and hold the whole run in memory.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.give_back()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.give_back()
        super().on_exception(trainer, pl_module, exception)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        batches, between = batch_idx + 1, trainer.val_check_batch
        ends = batches == trainer.num_training_batches or (between and batches % between == 0)
        if ends or batches % trainer.accumulate_grad_batches:
            return  # what follows belongs to this step: a validation, the end of an epoch, the rest of its images
        if trainer.world_size > 1 and batches % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # to ask all ranks at each step would cost
        due = trainer.strategy.reduce_boolean_decision(self.is_due(trainer.global_step), all=False)
        self.conclude(trainer, due, in_step=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if not trainer.sanity_checking and progress.processed < trainer.num_training_batches:
            self.conclude(trainer, True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.conclude(trainer, True)

    def is_due(self, step: int) -> bool:
        """Whether it is time for last.ckpt."""
        minutes = (time.monotonic() - self.saved_time) / 60
        by_step = self.every_n_steps is not None and step - self.saved_step >= self.every_n_steps
        return by_step or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    def conclude(self, trainer: Trainer, due: bool, in_step: bool = False) -> None:
        """Writes last.ckpt where it is `due`, and where the run was asked to stop; then stops it."""
        if trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        stops = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if self.saves_last and (due or stops):
            if in_step and trainer.loggers:  # which Lightning would do after this, and too late where the run ends here
                trainer._logger_connector.update_train_step_metrics()
            self.last_model_path = str(Path(self.dirpath or "", "last.ckpt"))
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if stops:
            number = self.signal or signal.SIGTERM
            how = "the same words and --ckpt_path last go on" if self.saves_last else "there is no last.ckpt"
            log.warning("stopped after step %d; %s", trainer.global_step, how)
            raise Stopped(128 + number)
