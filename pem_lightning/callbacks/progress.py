"""A live bar over all iterations on a terminal, a line now and then elsewhere (log files, CI)."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column
from rich.text import Text
from torch import nn

from pem_lightning.training.module import PEMModule

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


def is_logging_step(trainer: Trainer, *, coming: bool = False) -> bool:
    """Whether the step that has just been done, or the coming one, is one that Lightning logs."""
    return (trainer.global_step + coming) % cast(Any, trainer).log_every_n_steps == 0


class LearningRates(Callback):
    """Logs `lr/<group>` when Lightning logs the losses, and in the same row.

    Groups that differ in weight decay alone have one name: `backbone`, `decoders` (all of the network that is no
    backbone), or `network` where a group has both. Equal names with different rates are numbered.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the rates that the step is made with."""
        if trainer.loggers and is_logging_step(trainer, coming=True):
            backbone = cast(nn.Module, cast(PEMModule, pl_module).network.backbone)
            groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
            pl_module.log_dict(learning_rates(groups, set(map(id, backbone.parameters()))), batch_size=1)


def learning_rates(groups: Iterable[Mapping[str, Any]], backbone: set[int]) -> dict[str, float]:
    """Learning rates by readable names, `lr/backbone` and the like.

    Args:
        groups: of an optimiser.
        backbone: the `id` of every parameter in the backbone.
    """
    rates: dict[str, float] = {}
    for group in groups:
        inside = [id(parameter) in backbone for parameter in cast(list[nn.Parameter], group["params"])]
        name = base = "lr/" + ("backbone" if all(inside) else "network" if any(inside) else "decoders")
        number = 2
        while rates.get(name, group["lr"]) != group["lr"]:
            name, number = f"{base}_{number}", number + 1
        rates[name] = group["lr"]
    return rates


class LoaderWait(Profiler):
    """Adds up how long the training loop waits for the loader's next batch; Lightning calls it around that.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self._start: float | None = None

    def start(self, action_name: str) -> None:
        """Start the clock if it is the loader's turn."""
        if action_name.endswith("train_dataloader_next"):
            self._start = time.perf_counter()

    def stop(self, action_name: str) -> None:
        """Stop the clock."""
        if self._start is not None and action_name.endswith("train_dataloader_next"):
            self.seconds += time.perf_counter() - self._start
            self._start = None


class Throughput(Callback):
    """Logs how fast training is, over the steps since it was logged before; validation does not count.

    | name | what |
    |---|---|
    | `train/images_per_second` | of all processes |
    | `train/data_wait_percent` | of the time, in which the loop of this process waits for the loader |
    | `train/gpu_memory_gib` | the most that tensors have taken so far on this process's GPU |

    Nothing of it waits for a GPU. A loop that waits for its loader need not leave a GPU idle, which may have work
    left: the percentage is the most that faster loading could save. It is left out where `trainer.profiler` is
    already something else.

    Attributes:
        watch: of the training under way, or the last one.
    """

    def __init__(self) -> None:
        self.watch = Stopwatch()
        self._wait = LoaderWait()
        self._measures_wait = False
        self._waited = 0.0
        self._logged = (0.0, 0, 0.0)

    @property
    def data_wait_percent(self) -> float | None:
        """Of the whole training so far; None if it is not measured."""
        return 100 * self._wait.seconds / max(self.watch.training, 1e-9) if self._measures_wait else None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning tell when it waits."""
        owner = cast(Any, trainer)
        if stage == "fit" and isinstance(owner.profiler, PassThroughProfiler):
            owner.profiler = self._wait
            self._measures_wait = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.watch = Stopwatch()
        self._wait.seconds = 0.0
        self._logged = (0.0, 0, 0.0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and log when Lightning does."""
        self.watch.step(len(batch.images) * trainer.world_size)
        if not (trainer.loggers and is_logging_step(trainer)):
            return
        now = (self.watch.training, self.watch.images, self._wait.seconds)
        seconds, images, waited = (new - old for new, old in zip(now, self._logged, strict=True))
        self._logged = now
        values = {"train/images_per_second": images / max(seconds, 1e-9)}
        if self._measures_wait:
            values["train/data_wait_percent"] = 100 * waited / max(seconds, 1e-9)
        if (device := trainer.strategy.root_device).type == "cuda":
            values["train/gpu_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        pl_module.log_dict(values, batch_size=1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.watch.pause()
        self._waited = self._wait.seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on after a validation and all that the others did at its end: pictures, tables, checkpoints."""
        if self.watch.paused:
            self.watch.resume()
            self._wait.seconds = self._waited

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last validation."""
        self.watch.resume()


class Stopwatch:
    """Counts steps and images, and how long they took; `time.monotonic` is all it looks at.

    Attributes:
        steps: training steps since the start.
        images: images of these steps, over all processes.
        validations: that were finished.
        validating: seconds of all of them.
    """

    def __init__(self) -> None:
        self.steps = self.images = self.validations = 0
        self.validating = 0.0
        self._start = time.monotonic()
        self._paused: float | None = None
        self._recent: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=101)  # training seconds and images by step

    @property
    def training(self) -> float:
        """Seconds since the start without validation."""
        return (self._paused or time.monotonic()) - self._start - self.validating

    @property
    def paused(self) -> bool:
        """Whether a validation is under way."""
        return self._paused is not None

    def step(self, images: int) -> None:
        """A training step over so many images is done."""
        self.steps += 1
        self.images += images
        self._recent.append((self.training, self.images))

    def pause(self) -> None:
        """Validation begins."""
        self._paused = time.monotonic()

    def resume(self) -> None:
        """Validation is over, if there was one."""
        if self._paused is not None:
            self.validating += time.monotonic() - self._paused
            self.validations += 1
            self._paused = None

    @property
    def seconds_per_step(self) -> float | None:
        """Of the last hundred steps; None before the first."""
        return self._recent_seconds() / (len(self._recent) - 1) if self.steps else None

    @property
    def images_per_second(self) -> float | None:
        """Of the last hundred steps; None before the first."""
        if not self.steps:
            return None
        return (self._recent[-1][1] - self._recent[0][1]) / max(self._recent_seconds(), 1e-9)

    def to_go(self, steps: int, validations: int) -> float | None:
        """Seconds for so many steps and validations; None before the first step.

        A validation counts as long as those before it took, and nothing as long as there was none.
        """
        if (pace := self.seconds_per_step) is None:
            return None
        return pace * steps + validations * self.validating / max(self.validations, 1)

    def _recent_seconds(self) -> float:
        return self._recent[-1][0] - self._recent[0][0]
