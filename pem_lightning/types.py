"""The few types every part of the project shares.

Values that travel through PyTorch's and Lightning's machinery (collate, pinning, device transfer,
`torch.export`) are named tuples, because all of that machinery understands them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from torch import Tensor

VOID_ID = 0
"""The segment id of unlabelled pixels in every panoptic id map."""


class Segment(NamedTuple):
    """One segment of a panoptic map, as ground truth or as a prediction.

    Attributes:
        id: the value of its pixels in the id map, never `VOID_ID`.
        class_id: contiguous class index, 0 to K-1.
        is_thing: whether its class is countable.
        is_crowd: whether it is a group of things that are not told apart (ground truth only).
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
        panoptic: segment id of every pixel; `VOID_ID` where nothing is annotated. In training it has the
            image's size; in evaluation the size of the annotation, whatever size the image was resized to.
        segments: what the ids mean. A segment that augmentation removed from the map may still be listed.
        name: unique within its data set; names outputs and errors.
    """

    image: UInt8[Tensor, "3 height width"]
    panoptic: Int32[Tensor, "map_height map_width"]
    segments: tuple[Segment, ...]
    name: str


class Target(NamedTuple):
    """What the losses compare with: one boolean mask and one class per segment."""

    labels: Int64[Tensor, " segments"]
    masks: Bool[Tensor, "segments height width"]


class Batch(NamedTuple):
    """Named samples of possibly different sizes. `targets` is empty in evaluation, `samples` in training."""

    images: list[UInt8[Tensor, "3 _ _"]]
    targets: list[Target]
    samples: list[Sample]
    names: tuple[str, ...] = ()


class MaskFactors(NamedTuple):
    """The two matrices whose product are the mask logits. What needs a few queries only multiplies these alone."""

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
    """One class: its name, customary RGB colour, kind, and its id in the data set's official files."""

    name: str
    color: tuple[int, int, int]
    is_thing: bool
    category_id: int


@dataclass(frozen=True)
class DatasetInfo:
    """Everything that is known about a data set's classes; the only place where a class count lives.

    A class's position in `classes` is the contiguous index that model, losses and metrics use.
    """

    name: str
    classes: tuple[ClassInfo, ...]

    @property
    def num_classes(self) -> int:
        """Number of classes, "no object" and void not counted."""
        return len(self.classes)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by class index."""
        return tuple(c.name for c in self.classes)

    @property
    def thing_classes(self) -> frozenset[int]:
        """Indices of the countable classes."""
        return frozenset(i for i, c in enumerate(self.classes) if c.is_thing)

    @property
    def colors(self) -> UInt8[np.ndarray, "classes 3"]:
        """RGB colours by class index."""
        return np.array([c.color for c in self.classes], np.uint8).reshape(-1, 3)

    @property
    def category_ids(self) -> tuple[int, ...]:
        """The official files' ids by class index."""
        return tuple(c.category_id for c in self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as checkpoints store them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> DatasetInfo:
        """Inverse of `to_dict`."""
        classes = (ClassInfo(**{**c, "color": tuple(c["color"])}) for c in state["classes"])
        return cls(state["name"], tuple(classes))


class UserError(Exception):
    """Something the user can put right. The message is one line that says what is wrong and names the cure.

    The command line prints it without a traceback and exits with code 2.
    """
