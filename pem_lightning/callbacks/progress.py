"""A live progress bar on a terminal, a line now and then elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar


class ProgressLines(ProgressBar):
    """Prints step, loss, metric, speed and time to go.

    Args:
        monitor: the metric to show, by its logged name.
        interval: seconds between lines.
    """

    def __init__(self, monitor: str, interval: float = 15.0) -> None:
        super().__init__()
        self.monitor = monitor
        self.interval = interval
        self._enabled = True
        self._start = (0.0, 0)
        self._last = 0.0

    def disable(self) -> None:
        """Print nothing, as Lightning asks of all processes but one."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic(), trainer.global_step
        self._last = self._start[0]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line when one is due."""
        now, step = time.monotonic(), trainer.global_step
        if not self._enabled or (now - self._last < self.interval and step != trainer.max_steps):
            return
        self._last = now
        metrics = trainer.callback_metrics
        pace = (now - self._start[0]) / max(step - self._start[1], 1)
        parts = [f"step {step}/{trainer.max_steps}", f"loss {float(metrics.get('train/loss', float('nan'))):.2f}"]
        if self.monitor in metrics:
            parts.append(f"{self.monitor.removeprefix('val/')} {float(metrics[self.monitor]):.1f}")
        parts.append(f"{len(batch.images) * trainer.world_size / pace:.1f} images/s")
        parts.append(f"{timedelta(seconds=round(pace * (trainer.max_steps - step)))} to go")
        print("  ".join(parts), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metric."""
        if self._enabled and (value := trainer.callback_metrics.get(self.monitor)) is not None:
            print(f"step {trainer.global_step}  {self.monitor} {float(value):.2f}", flush=True)


def progress_bar(monitor: str) -> ProgressBar:
    """Make what suits the output: a bar on a terminal, lines elsewhere.

    Args:
        monitor: the metric that lines show; bars show all that are logged for them.
    """
    return RichProgressBar() if sys.stdout.isatty() else ProgressLines(monitor)
