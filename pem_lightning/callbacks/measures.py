"""What is logged of the training loop itself: learning rates, speed, waiting for data, memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch import nn

from pem_lightning.callbacks.stopwatch import Stopwatch
from pem_lightning.module import PEMModule


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
