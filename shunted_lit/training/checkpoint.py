"""Checkpoints that survive an interruption at any moment, and a logger and a callback that resume exactly."""

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

from shunted_lit.utils.checks import check_positive

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file and rename it, so that an interruption never leaves a damaged one.

    Raises:
        OSError: the file cannot be written; the previous checkpoint is kept.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()  # torch.save to a file does not report why it failed
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
            kept = "; the previous checkpoint is kept" if path.is_file() else ""
            raise OSError(
                f"{path}: cannot write a checkpoint of {content.tell() / 1e6:.0f} MB ({error.strerror}){kept}; free "
                "space or choose another `trainer.default_root_dir`."
            ) from error


class RunLogger(CSVLogger):
    """CSVLogger that writes each row at once, no row twice, and no hparams.yaml: config.yaml has all settings.

    Args:
        root: folder of the runs.
        version: number of this run; None on ranks other than 0.
        step: for a run that is continued in its folder, its steps done; later rows of metrics.csv are removed.
    """

    def __init__(self, root: Path, version: int | None, step: int | None = None):
        super().__init__(root, name="", version=version, flush_logs_every_n_steps=1)
        self.last_row: Any = None
        if step is not None:
            self.remove_rows_from(Path(self.log_dir), step)

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log a row, unless it was the last one: `RunCheckpoint` logs ahead of Lightning."""
        row = (step, dict(metrics))
        if row != self.last_row:
            self.last_row = row
            super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing."""

    @rank_zero_only
    def remove_rows_from(self, folder: Path, step: int) -> None:
        """Rewrite metrics.csv with the rows before a step."""
        file, before = folder / "metrics.csv", folder / ".metrics.csv.before"
        if file.is_file() and not before.is_file():  # it exists if an earlier rewrite was interrupted
            file.replace(before)
        if before.is_file():
            with before.open(newline="", encoding="utf-8") as lines:
                rows = [row for row in csv.DictReader(lines) if int(row["step"]) < step]
            for row in rows:
                values: Any = {name: value for name, value in row.items() if value}  # text, so that no digit changes
                self.experiment.log_metrics(values, int(row["step"]))
            self.save()
            before.unlink()


class Stopped(SystemExit):
    """Exit after a signal, once the step is finished and last.ckpt is written."""


class RunCheckpoint(ModelCheckpoint):
    """ModelCheckpoint for best.ckpt, and last.ckpt after each epoch and validation, at intervals, and on a signal.

    SIGINT (Ctrl-C) and SIGTERM end a run after its current step or validation, with exit code 130 or 143; a second
    signal ends it at once. A run that resumes from last.ckpt equals one that was never stopped, bit for bit.

    Args:
        last_every_n_steps: optimizer steps between two last.ckpt within an epoch; null for none.
        last_every_n_minutes: minutes between two last.ckpt within an epoch; null for none.
        save_last: whether to write last.ckpt at all.
        keywords: further arguments of ModelCheckpoint.

    Raises:
        ValueError: an interval is not above 0.
    """

    def __init__(
        self,
        last_every_n_steps: int | None = None,
        last_every_n_minutes: float | None = 15,
        save_last: bool | None = True,
        **keywords: Any,
    ):
        super().__init__(save_last=None, **keywords)  # Lightning's last.ckpt is only written with the best
        check_positive(**{"checkpoint.last_every_n_steps": last_every_n_steps})
        check_positive(**{"checkpoint.last_every_n_minutes": last_every_n_minutes})
        self.every_n_steps, self.every_n_minutes = last_every_n_steps, last_every_n_minutes
        self.saves_last = bool(save_last)
        self.saved_step, self.saved_time = 0, 0.0
        self.signal: int | None = None
        self.previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if trainer.is_global_zero and self.saves_last and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            Path(self.dirpath or "").mkdir(parents=True, exist_ok=True)  # `find_last_run` looks for it
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {n: signal.signal(n, self.on_signal) for n in (signal.SIGINT, signal.SIGTERM)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, and remove best checkpoints of steps that were lost and will be repeated."""
        super().load_state_dict(state_dict)
        if self.dirpath != state_dict.get("dirpath", self.dirpath):
            return
        kept = {Path(path).name for path in self.best_k_models}
        for path in Path(self.dirpath or "").glob("*.ckpt"):
            if re.fullmatch(rf"{re.escape(str(self.filename))}(-v\d+)?\.ckpt", path.name) and path.name not in kept:
                path.unlink(missing_ok=True)  # another rank may have removed it

    def on_signal(self, number: int, frame: Any) -> None:
        """Note the first signal; the next one is handled as before training."""
        self.signal = number
        self.restore_handlers()
        log.warning("%s: stopping after this step; send it again to stop at once", signal.Signals(number).name)

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers."""
        while self.previous_handlers:
            signal.signal(*self.previous_handlers.popitem())

    # Handlers are restored before Lightning restores its own; otherwise ours stay and keep the run in memory.

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.restore_handlers()
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.restore_handlers()
        super().on_exception(trainer, pl_module, exception)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        batches, between = batch_idx + 1, trainer.val_check_batch
        ends = batches == trainer.num_training_batches or (between and batches % between == 0)
        if ends or batches % trainer.accumulate_grad_batches:
            return  # a validation, the end of an epoch, or the rest of an accumulated batch belongs to this step
        if trainer.world_size > 1 and batches % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return  # the decision of all ranks needs communication
        due = trainer.strategy.reduce_boolean_decision(self.is_due(trainer.global_step), all=False)
        self.save_or_stop(trainer, due, in_step=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if not trainer.sanity_checking and progress.processed < trainer.num_training_batches:
            self.save_or_stop(trainer, due=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.save_or_stop(trainer, due=True)

    def is_due(self, step: int) -> bool:
        """Return whether an interval for last.ckpt has passed."""
        minutes = (time.monotonic() - self.saved_time) / 60
        by_step = self.every_n_steps is not None and step - self.saved_step >= self.every_n_steps
        return by_step or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    def save_or_stop(self, trainer: Trainer, due: bool, in_step: bool = False) -> None:
        """Write last.ckpt if it is due or if any rank got a signal; in the latter case, raise `Stopped`."""
        if trainer.fast_dev_run or trainer.state.fn != "fit":  # type: ignore[attr-defined]
            return
        stops = trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False)
        if self.saves_last and (due or stops):
            if in_step and trainer.loggers:
                # Private: logs the step now. Lightning does so only after this hook, too late if the run ends here.
                trainer._logger_connector.update_train_step_metrics()
            self.last_model_path = str(Path(self.dirpath or "", "last.ckpt"))
            trainer.save_checkpoint(self.last_model_path, self.save_weights_only)
            self.saved_step, self.saved_time = trainer.global_step, time.monotonic()
        if stops:
            hint = "resume with the same command and --ckpt_path last" if self.saves_last else "no last.ckpt was saved"
            log.warning("stopped after step %d; %s", trainer.global_step, hint)
            raise Stopped(128 + (self.signal or signal.SIGTERM))
