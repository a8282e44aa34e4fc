"""A few predictions next to the truth, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from pem_lightning.data.targets import class_map
from pem_lightning.inference.task import Result
from pem_lightning.inference.visualize import overlay_panoptic, overlay_semantic, side_by_side
from pem_lightning.types import Batch, DatasetInfo, Sample


LEGIBLE_HEIGHT = 256
"""Smaller images are enlarged, so that the names on them can be read."""


def draw_panel(sample: Sample, result: Result, info: DatasetInfo) -> np.ndarray:
    """Image, truth and prediction side by side, as uint8 [H, W, 3]. The sample's image has its map's size."""
    sample, result = _enlarge(sample, result)
    if result.panoptic is None:
        truth = overlay_semantic(sample.image, class_map(sample), info)
        prediction = overlay_semantic(sample.image, result.semantic, info)
    else:
        truth = overlay_panoptic(sample.image, sample.panoptic, sample.segments, info)
        prediction = overlay_panoptic(sample.image, result.panoptic, result.segments, info)
    image = sample.image.permute(1, 2, 0).numpy()
    return side_by_side([image, truth, prediction], ["image", "truth", "prediction"])


def _enlarge(sample: Sample, result: Result) -> tuple[Sample, Result]:
    """Whole multiples of the size, up to `LEGIBLE_HEIGHT` or just above."""
    factor = -(-LEGIBLE_HEIGHT // sample.image.shape[1])

    def repeat(x: Tensor) -> Tensor:
        return x.cpu().repeat_interleave(factor, -2).repeat_interleave(factor, -1)

    panoptic = None if result.panoptic is None else repeat(result.panoptic)
    return (
        sample._replace(image=repeat(sample.image), panoptic=repeat(sample.panoptic)),
        result._replace(semantic=repeat(result.semantic), panoptic=panoptic),
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
        for i, (sample, result) in enumerate(zip(batch.samples, outputs, strict=True), first):
            if i >= self.num_images or sample.image.shape[1:] != sample.panoptic.shape:
                continue
            self.directory.mkdir(parents=True, exist_ok=True)
            panel = draw_panel(sample, result, pl_module.info)
            Image.fromarray(panel).save(self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png")
