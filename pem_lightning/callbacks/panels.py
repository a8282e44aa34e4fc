"""A few predictions next to the truth, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from pem_lightning.data.targets import class_map
from pem_lightning.inference.task import Result
from pem_lightning.inference.visualize import overlay_panoptic, overlay_semantic, side_by_side
from pem_lightning.module import PEMModule
from pem_lightning.types import Batch, DatasetInfo, Sample

LEGIBLE_HEIGHT = 256
"""Smaller images are enlarged, so that the names on them can be read."""


def draw_panel(sample: Sample, result: Result, info: DatasetInfo) -> np.ndarray:
    """Image, truth and prediction side by side, as uint8 [H, W, 3]."""
    sample, result = _enlarge(sample, result.cpu())
    assert result.semantic is not None
    if result.panoptic is None:
        truth = overlay_semantic(sample.image, class_map(sample), info)
        prediction = overlay_semantic(sample.image, result.semantic, info)
    else:
        truth = overlay_panoptic(sample.image, sample.panoptic, sample.segments, info)
        prediction = overlay_panoptic(sample.image, result.panoptic, result.segments, info)
    image = sample.image.permute(1, 2, 0).numpy()
    return side_by_side([image, truth, prediction], ["image", "truth", "prediction"])


def _enlarge(sample: Sample, result: Result) -> tuple[Sample, Result]:
    """Everything at the annotation's size, or at the least multiple of it that is legible."""
    height, width = sample.panoptic.shape
    factor = -(-LEGIBLE_HEIGHT // height)
    image = sample.image.cpu().permute(1, 2, 0).numpy()
    image = np.array(Image.fromarray(image).resize((factor * width, factor * height), Image.Resampling.BICUBIC))

    def repeat(ids: Tensor) -> Tensor:
        return ids.cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1)

    enlarged = sample._replace(image=torch.from_numpy(image).permute(2, 0, 1), panoptic=repeat(sample.panoptic))
    return enlarged, result._replace(
        semantic=None if result.semantic is None else repeat(result.semantic),
        panoptic=None if result.panoptic is None else repeat(result.panoptic),
    )


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
            self.directory.mkdir(parents=True, exist_ok=True)
            panel = draw_panel(sample, result, cast(PEMModule, pl_module).info)
            Image.fromarray(panel).save(self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png")
