"""Progress on the console, and throughput for the loggers."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class Throughput(Callback):
    """Logs `train/images_per_second` of all processes, and on a GPU `train/gpu_memory_gib`, the peak so far.

    Validation does not count. Lightning's `ThroughputMonitor` waits for the GPU at every step; this one never does.
    """

    def __init__(self) -> None:
        self._images = 0  # since the last log
        self._start = 0.0
        self._validation: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._images, self._start, self._validation = 0, time.monotonic(), None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._validation = time.monotonic()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on after a validation."""
        if self._validation is not None:
            self._start += time.monotonic() - self._validation
            self._validation = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log in the same steps as Lightning."""
        self._images += len(batch.images) * trainer.world_size
        if trainer.loggers and _is_logging_step(trainer):
            now = time.monotonic()
            values = {"train/images_per_second": self._images / max(now - self._start, 1e-9)}
            if (device := trainer.strategy.root_device).type == "cuda":
                values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            pl_module.log_dict(values, batch_size=1)
            self._images, self._start = 0, now


def progress_bar(monitor: str) -> ProgressBar:
    """A live bar on a terminal, otherwise a line now and then; with the metric that is logged as `monitor`."""
    return LiveProgress(monitor) if sys.stdout.isatty() else PlainProgress(monitor)


class LiveProgress(RichProgressBar):
    """Lightning's bar over all steps of a training instead of one epoch's, with loss, metric and throughput."""

    def __init__(self, monitor: str) -> None:
        super().__init__(refresh_rate=4)
        self.monitor = monitor
        self._values: dict[str, Any] = {}

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the whole training."""
        return self.trainer.max_steps if self.trainer.max_steps > 0 else super().total_train_batches

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs do not restart the bar."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar by steps."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description="Training  ")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at the end of an evaluation."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "validate":
            self.on_fit_end(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the results are printed."""
        if self.progress is not None:
            self.progress.stop()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Values of the last logging step; reading them in other steps would wait for the GPU."""
        if _is_logging_step(trainer):
            self._values = _values(trainer, self.monitor)
        return self._values


class PlainProgress(ProgressBar):
    """Prints a line of numbers every 15 seconds or later, and the metric after every validation."""

    def __init__(self, monitor: str) -> None:
        super().__init__()
        self.monitor = monitor
        self._enabled = True
        self._start = self._last = 0.0
        self._first_step = 0

    def disable(self) -> None:
        """Print nothing; Lightning wants that of all processes but one."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print if it is time. Only in logging steps, because reading values waits for the GPU."""
        now, step, total = time.monotonic(), trainer.global_step, trainer.max_steps
        is_due = now - self._last >= 15 and _is_logging_step(trainer)
        if not self._enabled or not (is_due or step == total):
            return
        self._last = now
        parts = [f"step {step}/{total}" if total > 0 else f"step {step}"]
        parts += [f"{name} {value:.2f}" for name, value in _values(trainer, self.monitor).items()]
        if step < total:
            seconds = (now - self._start) / (step - self._first_step) * (total - step)  # validations included
            parts.append(f"{timedelta(seconds=round(seconds))} to go")
        print("  ".join(parts), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metric."""
        value = trainer.callback_metrics.get(self.monitor)
        if self._enabled and value is not None and trainer.state.fn == "fit":
            print(f"step {trainer.global_step}  {self.monitor.removeprefix('val/')} {value:.2f}", flush=True)


def _is_logging_step(trainer: Trainer) -> bool:
    """Whether Lightning logs the values of the step that has just been done."""
    return trainer.global_step % cast(Any, trainer).log_every_n_steps == 0


def _values(trainer: Trainer, monitor: str) -> dict[str, float]:
    """Loss, metric and throughput, as far as they are known."""
    labels = {"train/loss": "loss", monitor: monitor.removeprefix("val/"), "train/images_per_second": "images/s"}
    metrics = trainer.callback_metrics
    return {label: float(metrics[name]) for name, label in labels.items() if name in metrics}
