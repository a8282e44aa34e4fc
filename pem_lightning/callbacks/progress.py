"""A live bar over all iterations on a terminal, a line now and then elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from pem_lightning.callbacks.measures import is_logging_step
from pem_lightning.callbacks.stopwatch import Stopwatch

NOTABLE_WAIT = 5.0
"""Percent of the time that training may wait for data before the console mentions it."""

PARTS = {"class": "train/loss_ce", "mask": "train/loss_mask", "dice": "train/loss_dice"}
"""The last layer's losses by what they are called here."""


class ProgressLines(ProgressBar):
    """Prints step, losses, metric, speed and time to go.

    The time to go includes the validations to come, which are taken to be as long as those before; as long as there
    was none it is called "at least".

    Args:
        monitor: the metric to show, by its logged name.
        interval: seconds between lines.
    """

    def __init__(self, monitor: str, interval: float = 15.0) -> None:
        super().__init__()
        self.monitor = monitor
        self.interval = interval
        self._enabled = True
        self._watch = Stopwatch()
        self._last = self._read = 0.0
        self._values: dict[str, float] = {}

    def disable(self) -> None:
        """Print nothing, as Lightning asks of all processes but one."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._watch = Stopwatch()
        self._last = time.monotonic()
        self._read = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line when one is due."""
        self._watch.step(len(batch.images) * trainer.world_size)
        if not self._enabled:
            return
        now = time.monotonic()
        # To read a value waits for the GPU: only where Lightning's loggers do so, too. A CPU has nothing to wait for.
        on_cpu = trainer.strategy.root_device.type == "cpu"
        if is_logging_step(trainer) or (on_cpu and now - self._read >= 1):
            self._read = now
            self._read_values(trainer)
        self._step_is_done(trainer, now)

    def _read_values(self, trainer: Trainer) -> None:
        names = ("train/loss", *PARTS.values(), "train/data_wait_percent", self.monitor)
        metrics = trainer.callback_metrics
        self._values = {name: float(metrics[name]) for name in names if name in metrics}

    def _step_is_done(self, trainer: Trainer, now: float) -> None:
        if now - self._last >= self.interval or trainer.global_step == trainer.max_steps:
            self._last = now
            step, *to_go = self.place(trainer)
            print("  ".join([step, *self.state(), *to_go]), flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._watch.pause()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on after a validation and all that was done at its end."""
        self._watch.resume()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metric."""
        if self._enabled:
            self._read_values(trainer)
            self._validation_is_done(trainer)

    def _validation_is_done(self, trainer: Trainer) -> None:
        if self.monitor in self._values:
            print(f"step {trainer.global_step}  {self._metric(2)}", flush=True)

    def place(self, trainer: Trainer) -> list[str]:
        """Where training stands: step and time to go."""
        step, total = trainer.global_step, trainer.max_steps
        if total <= 0:
            return [f"step {step}"]
        validations = _validations_to_come(trainer)
        seconds = self._watch.to_go(total - step, validations)
        if seconds is None:
            return [f"step {step}/{total}"]
        at_least = "at least " if validations and not self._watch.validations else ""
        return [f"step {step}/{total}", f"{at_least}{timedelta(seconds=round(seconds))} to go"]

    def state(self) -> list[str]:
        """How training stands: losses, metric, speed, and waiting for data where it is notable."""
        values, parts = self._values, []
        if (loss := values.get("train/loss")) is not None:
            last = ", ".join(f"{label} {values[name]:.2f}" for label, name in PARTS.items() if name in values)
            parts.append(f"loss {loss:.2f}" + (f" (last layer: {last})" if last else ""))
        if self.monitor in values:
            parts.append(self._metric(1))
        if (speed := self._watch.images_per_second) is not None:
            parts.append(f"{speed:.1f} images/s")
        if (wait := values.get("train/data_wait_percent", 0.0)) >= NOTABLE_WAIT:
            parts.append(f"{wait:.0f} % waiting for data")
        return parts

    def _metric(self, digits: int) -> str:
        return f"{self.monitor.removeprefix('val/')} {self._values[self.monitor]:.{digits}f}"


def _validations_to_come(trainer: Trainer) -> int:
    interval = trainer.val_check_interval
    batches = trainer.num_val_batches
    if not isinstance(interval, int) or not interval or not sum(batches if isinstance(batches, list) else [batches]):
        return 0
    return trainer.max_steps // interval - (trainer.global_step - 1) // interval  # that of the last step is to come


class LiveProgress(ProgressLines):
    """Shows the same as `ProgressLines` as one live bar over a line of numbers, and a second bar during validation."""

    def __init__(self, monitor: str) -> None:
        super().__init__(monitor)
        self._bars = _Bars()
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

    def _step_is_done(self, trainer: Trainer, now: float) -> None:
        if self._training is not None:
            self._bars.show(self.state())
            description = "  ".join(self.place(trainer))
            self._bars.update(self._training, completed=trainer.global_step, description=description)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the second bar."""
        super().on_validation_start(trainer, pl_module)
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

    def _validation_is_done(self, trainer: Trainer) -> None:
        """Take the second bar away; the metric is among the numbers."""
        if self._validation is not None:
            self._bars.remove_task(self._validation)
            self._validation = None
        if self._training is not None:
            self._bars.show(self.state())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the full bar behind, before the results are printed."""
        self._bars.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._bars.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._bars.stop()


class _Bars(Progress):
    """Bars that fill the terminal's width, and below them numbers that wrap where it is narrow."""

    def __init__(self) -> None:
        columns: list[ProgressColumn] = [
            BarColumn(None, table_column=Column(ratio=1, min_width=4)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        ]
        self._numbers = _Numbers()
        super().__init__(*columns, expand=True, refresh_per_second=4)

    def show(self, parts: list[str]) -> None:
        """Change the numbers."""
        self._numbers.parts = parts

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars and the numbers."""
        yield from super().get_renderables()
        yield self._numbers


class _Numbers:
    """Parts that are broken between, and not inside, where the terminal is narrow."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _wrapped(self.parts, options.max_width)


def _wrapped(parts: list[str], width: int) -> Text:
    """Parts in lines of a terminal's width, broken between parts if need be."""
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}  {part}".strip()
        if len(longer) > width and lines[-1]:
            lines.append(part)
        else:
            lines[-1] = longer
    return Text("\n".join(line for line in lines if line))


def progress_bar(monitor: str) -> ProgressBar:
    """Make what suits the output: a live bar on a terminal, lines elsewhere.

    Args:
        monitor: the metric to show, by its logged name.
    """
    return LiveProgress(monitor) if sys.stdout.isatty() else ProgressLines(monitor)
