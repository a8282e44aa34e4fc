"""A live bar over all iterations on a terminal, a line now and then elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, Progress, TaskID, TextColumn


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
        now = time.monotonic()
        if self._enabled and (now - self._last >= self.interval or trainer.global_step == trainer.max_steps):
            self._last = now
            print(self.status(trainer, len(batch.images)), flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metric."""
        if self._enabled and (value := trainer.callback_metrics.get(self.monitor)) is not None:
            print(f"step {trainer.global_step}  {self.monitor} {float(value):.2f}", flush=True)

    def status(self, trainer: Trainer, batch_size: int) -> str:
        """Where training stands, in one line.

        Args:
            trainer: in training.
            batch_size: images per device in one iteration.
        """
        step, total, metrics = trainer.global_step, trainer.max_steps, trainer.callback_metrics
        pace = (time.monotonic() - self._start[0]) / max(step - self._start[1], 1)
        parts = [f"step {step}/{total}" if total > 0 else f"step {step}"]
        parts.append(f"loss {float(metrics.get('train/loss', float('nan'))):.2f}")
        if self.monitor in metrics:
            parts.append(f"{self.monitor.removeprefix('val/')} {float(metrics[self.monitor]):.1f}")
        parts.append(f"{batch_size * trainer.world_size / pace:.1f} images/s")
        if total > 0:
            parts.append(f"{timedelta(seconds=round(pace * (total - step)))} to go")
        return "  ".join(parts)


class LiveProgress(ProgressLines):
    """Shows the same as `ProgressLines` as one live bar, and a second one during validation."""

    def __init__(self, monitor: str) -> None:
        super().__init__(monitor)
        self._bars = Progress(BarColumn(), TextColumn("{task.description}"))
        self._training: TaskID | None = None
        self._validation: TaskID | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to draw."""
        super().setup(trainer, pl_module, stage)
        if self._enabled:
            self._bars.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock and the bar."""
        super().on_train_start(trainer, pl_module)
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._training = self._bars.add_task("training", total=total, completed=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._training is not None:
            description = self.status(trainer, len(batch.images))
            self._bars.update(self._training, completed=trainer.global_step, description=description)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the second bar."""
        total = sum(int(count) for count in trainer.num_val_batches)
        self._validation = self._bars.add_task("validating", total=total)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the second bar."""
        if self._validation is not None:
            self._bars.advance(self._validation)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the second bar away; the metric is in the first."""
        if self._validation is not None:
            self._bars.remove_task(self._validation)
            self._validation = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar behind, before the results are printed."""
        self._bars.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._bars.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._bars.stop()


def progress_bar(monitor: str) -> ProgressBar:
    """Make what suits the output: a live bar on a terminal, lines elsewhere.

    Args:
        monitor: the metric to show, by its logged name.
    """
    return LiveProgress(monitor) if sys.stdout.isatty() else ProgressLines(monitor)
