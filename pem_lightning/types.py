"""The few types that everything shares. Named tuples travel through collate, pinning, device transfer and export."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

from pem_lightning.basic_types import (
    IGNORE_INDEX,
    VOID_ID,
    ClassInfo,
    DatasetInfo,
    Instance,
    Result,
    Segment,
    Task,
    UserError,
    check_task,
    did_you_mean,
)

__all__ = [
    "IGNORE_INDEX",
    "VOID_ID",
    "Batch",
    "ClassInfo",
    "DatasetInfo",
    "Instance",
    "MaskFactors",
    "Predictions",
    "Result",
    "Sample",
    "Segment",
    "Target",
    "Task",
    "UserError",
    "check_task",
    "did_you_mean",
]


class Sample(NamedTuple):
    """One RGB image with its annotation, as read from disk or after augmentation.

    In evaluation, `panoptic` has the annotation's size, whatever the image's is. Some segments may have no pixels.
    The name is unique within its data set.
    """

    image: UInt8[Tensor, "3 height width"]
    panoptic: Int32[Tensor, "map_height map_width"]
    segments: tuple[Segment, ...]
    name: str

    def class_map(self) -> Int64[Tensor, "map_height map_width"]:
        """Class index of every pixel, `IGNORE_INDEX` where nothing is annotated."""
        largest = max(int(self.panoptic.max()), *(s.id for s in self.segments), 0)
        table = torch.full((largest + 1,), IGNORE_INDEX)
        for segment in self.segments:
            table[segment.id] = segment.class_id
        return table.to(self.panoptic.device)[self.panoptic.long()]


class Target(NamedTuple):
    """What the losses compare with: one class and one mask per segment."""

    labels: Int64[Tensor, " segments"]
    masks: Bool[Tensor, "segments height width"]


class Batch(NamedTuple):
    """Named samples of possibly different sizes. `targets` is empty in evaluation, `samples` in training."""

    images: list[UInt8[Tensor, "3 _ _"]]
    targets: list[Target]
    samples: list[Sample]
    names: tuple[str, ...] = ()


class MaskFactors(NamedTuple):
    """The two matrices whose product is the mask logits; a few queries' masks need only their rows."""

    embeddings: Float[Tensor, "batch queries channels"]
    features: Float[Tensor, "batch channels quarter_height quarter_width"]


class Predictions(NamedTuple):
    """Output of PEM. The last class is "no object"; a quarter is of the padded image's size.

    In training, `auxiliary` has the predictions of the initial queries and of every layer but the last, in order, and
    `mask_factors` those of `mask_logits`.
    """

    class_logits: Float[Tensor, "batch queries classes_and_none"]
    mask_logits: Float[Tensor, "batch queries quarter_height quarter_width"]
    auxiliary: tuple[Predictions, ...] = ()
    mask_factors: MaskFactors | None = None
