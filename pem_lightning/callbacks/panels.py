"""Predictions next to the truth, as pictures: the first images of a validation, or its worst."""

from __future__ import annotations

import math
from bisect import insort
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Int32, Integer, UInt8
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from pem_lightning.callbacks.processes import gather
from pem_lightning.data.targets import class_map
from pem_lightning.files import write_file
from pem_lightning.inference.results import encode_png, stack_instances
from pem_lightning.inference.task import Result
from pem_lightning.inference.visualize import overlay_panoptic, side_by_side
from pem_lightning.module import PEMModule
from pem_lightning.types import VOID_ID, Batch, DatasetInfo, Sample, Segment

LEGIBLE_HEIGHT = 256
"""Smaller images are enlarged, so that the names on them can be read."""

Segmentation = tuple[Int32[Tensor, "map_height map_width"], tuple[Segment, ...]]
"""An id map and what its ids mean."""


class Shown(NamedTuple):
    """What a panel shows of one image: on the CPU, and small enough to keep some."""

    image: UInt8[Tensor, "3 height width"]
    truth: Segmentation
    prediction: Segmentation


def shown(sample: Sample, result: Result, info: DatasetInfo) -> Shown:
    """What the task of a result is about: segments, single things or classes."""
    image, ids, result = sample.image.cpu(), sample.panoptic.cpu(), result.cpu()
    if result.panoptic is not None:
        return Shown(image, (ids, sample.segments), (result.panoptic, result.segments))
    if result.semantic is not None:
        truth = class_map(sample._replace(panoptic=ids))
        return Shown(image, _regions(truth, info), _regions(result.semantic, info))
    objects, segments = stack_instances(result.instances, tuple(ids.shape))
    things = tuple(segment for segment in sample.segments if segment.is_thing)
    return Shown(image, (ids, things), (objects, tuple(segments)))


def _regions(classes: Integer[Tensor, "map_height map_width"], info: DatasetInfo) -> Segmentation:
    """A class map as one segment per class."""
    ids = torch.where(classes < info.num_classes, classes + 1, VOID_ID).int()
    return ids, tuple(Segment(k + 1, k, is_thing=False) for k in range(info.num_classes))


def draw_panel(what: Shown, info: DatasetInfo) -> UInt8[np.ndarray, "height width 3"]:
    """Image, truth and prediction side by side, at the annotation's size or at its least multiple that is legible."""
    height, width = what.truth[0].shape
    factor = -(-LEGIBLE_HEIGHT // height)
    image = Image.fromarray(what.image.permute(1, 2, 0).numpy())
    photo = np.array(image.resize((factor * width, factor * height), Image.Resampling.BICUBIC))

    def overlay(ids: Tensor, segments: tuple[Segment, ...]) -> np.ndarray:
        enlarged = ids.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return overlay_panoptic(photo, enlarged, segments, info)

    pictures = [photo, overlay(*what.truth), overlay(*what.prediction)]
    return side_by_side(pictures, ["image", "truth", "prediction"])


class PredictionPanels(Callback):
    """Draws the first images of every validation.

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
            panel = encode_png(draw_panel(shown(sample, result, info), info))
            write_file(self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png", panel)


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
                panel = encode_png(draw_panel(what, cast(PEMModule, pl_module).info))
                write_file(self.directory / f"{rank:0{digits}d}_{100 * score:.1f}_{name}.png", panel)
        self._worst = []
