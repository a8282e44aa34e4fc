"""The few types that everything shares. Named tuples travel through collate, pinning, device transfer and export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

VOID_ID = 0
"""Segment id of unlabelled pixels in every panoptic id map."""

IGNORE_INDEX = 255
"""Class of unlabelled pixels in every class map."""


class UserError(Exception):
    """A mistake of the user. The message is one line that names the cure; the command line exits with code 2."""


class Segment(NamedTuple):
    """One segment of a panoptic map, as ground truth or as a prediction.

    Attributes:
        id: the value of its pixels in the id map, never `VOID_ID`.
        class_id: contiguous class index, 0 to K-1.
        is_thing: whether its class is countable.
        is_crowd: a group of things that are not told apart (ground truth only).
        score: confidence in [0, 1] (predictions only).
    """

    id: int
    class_id: int
    is_thing: bool
    is_crowd: bool = False
    score: float | None = None


class Sample(NamedTuple):
    """One image with its annotation, as read from disk or after augmentation.

    Attributes:
        image: RGB, 0 to 255.
        panoptic: segment id of every pixel. In evaluation it has the annotation's size, whatever the image's is.
        segments: what the ids mean; some may have no pixels.
        name: unique within its data set.
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
    """Output of PEM.

    Attributes:
        class_logits: scores of the K classes and, last, of "no object".
        mask_logits: at a quarter of the padded image's size; positive means foreground.
        auxiliary: predictions of the initial queries and of every layer but the last, in order (training only).
        mask_factors: of `mask_logits`, where gradients are wanted.
    """

    class_logits: Float[Tensor, "batch queries classes_and_none"]
    mask_logits: Float[Tensor, "batch queries quarter_height quarter_width"]
    auxiliary: tuple[Predictions, ...] = ()
    mask_factors: MaskFactors | None = None


@dataclass(frozen=True)
class ClassInfo:
    """One class: name, customary RGB colour, whether it is countable, and its id in the data set's official files."""

    name: str
    color: tuple[int, int, int]
    is_thing: bool
    category_id: int


@dataclass(frozen=True)
class DatasetInfo:
    """A data set's classes. A class's position is the index that model, losses and metrics use."""

    name: str
    classes: tuple[ClassInfo, ...]

    @property
    def num_classes(self) -> int:
        """K, without "no object" and unlabelled."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class index."""
        return tuple(c.name for c in self.classes)

    @property
    def thing_classes(self) -> frozenset[int]:
        """Indices of the countable classes."""
        return frozenset(i for i, c in enumerate(self.classes) if c.is_thing)

    @property
    def colors(self) -> UInt8[np.ndarray, "classes 3"]:
        """RGB, by class index."""
        return np.array([c.color for c in self.classes], np.uint8).reshape(-1, 3)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """Ids of the official files, by class index."""
        return tuple(c.category_id for c in self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DatasetInfo:
        """Inverse of `to_dict`."""
        classes = (ClassInfo(**{**c, "color": tuple(c["color"])}) for c in state["classes"])
        return cls(state["name"], tuple(classes))
