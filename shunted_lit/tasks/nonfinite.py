"""Stop training before a loss or gradient of NaN or infinity reaches the weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

MIN_LOSS_SCALE = 2.0**-10  # of float16, which starts at 2 ** 16 and is halved at each overflow


class StopOnNonfinite(LightningModule):
    """Stop training at a non-finite loss or gradient, and save the batch that led to it.

    No optimizer step is taken and no checkpoint is written with such values. In float16, an overflow is no error: the
    gradient scaler skips the step and lowers its scale; training stops where the scale falls below `MIN_LOSS_SCALE`.

    Lightning's tuners train before `on_fit_start` of the module. Their training stops without an error: the LR finder
    raises the learning rate until the loss diverges.
    """

    is_tuning = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._current_batch = (batch_idx, batch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._current_batch = (batch_idx, None)  # two batches might not fit into the memory of the device

    def on_before_backward(self, loss: Tensor) -> None:
        """Raise ValueError where the loss is not finite; on several ranks the averaged gradients stop all at once."""
        if self._gradient_scaler() is None and self.trainer.world_size == 1 and not torch.isfinite(loss):
            self._stop(f"The loss is {float(loss.detach())}")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Raise ValueError where the gradients are not finite, or float16 overflows at the lowest loss scale."""
        if (scaler := self._gradient_scaler()) is not None:
            if (scale := scaler.get_scale()) < MIN_LOSS_SCALE:
                self._stop(f"float16 still overflows at a loss scale of {scale:g}")
            return
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            self._stop(f"The norm of the gradients is {float(norm)}")

    def _gradient_scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _stop(self, reason: str) -> None:
        """Save the batch and raise ValueError with the reason, step, learning rate, images and file."""
        if self.is_tuning:
            self.trainer.should_stop = True
            return
        batch_idx, batch = self._current_batch
        data: Any = getattr(self.trainer, "datamodule", None)
        names = data.names_of(self.current_epoch, batch_idx) if hasattr(data, "names_of") else []
        lrs = sorted({group["lr"] for group in self.trainer.optimizers[0].param_groups})
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        file = folder / f"nonfinite_rank_{self.global_rank}.pt"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"batch": batch, "batch_idx": batch_idx, "epoch": self.current_epoch, "names": names}, file)
        images = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(
            f"{reason} in step {self.global_step} (epoch {self.current_epoch}, batch {batch_idx}; learning rate "
            f"{', '.join(f'{lr:g}' for lr in lrs)}; images: {images or 'unknown'}). The batch is saved in {file}; read "
            "it with torch.load. Try a lower learning rate, a longer warm-up or `gradient_clip_val`."
        )
