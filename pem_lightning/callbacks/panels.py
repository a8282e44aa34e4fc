"""Predictions next to the truth, as pictures: the first images of a validation, or its worst."""

from __future__ import annotations

import math
from bisect import insort
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from pem_lightning.callbacks.loggers import Panel, record_panel
from pem_lightning.callbacks.shown import Shown, draw_panel, draw_pictures, shown
from pem_lightning.distributed import gather
from pem_lightning.files import write_or_warn
from pem_lightning.inference.results import encode_png
from pem_lightning.module import PEMModule
from pem_lightning.types import Batch


class PredictionPanels(Callback):
    """Draws the first images of every validation; trackers get them, too.

    Args:
        directory: pictures go to `directory/step_<step>_<name>.png`.
        num_images: how many.
    """

    def __init__(self, directory: str | Path, num_images: int = 4) -> None:
        self.directory = Path(directory)
        self.num_images = num_images

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw while images are wanted."""
        first = batch_idx * len(batch.samples)
        for i, (sample, result) in enumerate(zip(batch.samples, outputs["results"], strict=True), first):
            if i >= self.num_images:
                return
            info = cast(PEMModule, pl_module).info
            what = shown(sample, result, info)
            panel = Panel(sample.name, what, draw_pictures(what, info))
            path = self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png"
            write_or_warn(path, encode_png(draw_panel(panel.pictures)))
            record_panel(trainer.loggers, panel, info, trainer.global_step)


class WorstImages(Callback):
    """Draws the images of the lowest scores (see `Evaluator.update`) when an evaluation ends.

    Meanwhile every process keeps no more than that many, and of each only what is drawn. Images without a score, where
    nothing is annotated, are left out; among equals the first name comes first.

    Args:
        directory: pictures go to `directory/<rank>_<score>_<name>.png`, the worst being 01, the score in percent.
        num_images: how many, over all processes.
    """

    def __init__(self, directory: str | Path, num_images: int = 10) -> None:
        self.directory = Path(directory)
        self.num_images = num_images
        self._worst: list[tuple[float, str, Shown]] = []  # by rising score

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation."""
        self._worst = []
        if trainer.is_global_zero:
            for path in self.directory.glob("[0-9][0-9]*_*.png"):
                path.unlink()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what is worse than the best kept."""
        info = cast(PEMModule, pl_module).info
        for sample, result, score in zip(batch.samples, outputs["results"], outputs["scores"], strict=True):
            full = len(self._worst) >= self.num_images
            if math.isnan(score) or (full and (score, sample.name) > self._worst[-1][:2]):
                continue
            insort(self._worst, (score, sample.name, shown(sample, result, info)), key=lambda entry: entry[:2])
            del self._worst[self.num_images :]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the worst of all processes; each draws its own of them."""
        keys = sorted(key for part in gather([entry[:2] for entry in self._worst]) for key in part)
        digits = max(2, len(str(self.num_images)))
        for score, name, what in self._worst:
            rank = keys.index((score, name)) + 1
            if rank <= self.num_images:
                panel = encode_png(draw_panel(draw_pictures(what, cast(PEMModule, pl_module).info)))
                write_or_warn(self.directory / f"{rank:0{digits}d}_{100 * score:.1f}_{name}.png", panel)
        self._worst = []
