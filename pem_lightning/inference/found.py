"""What was found in an image, described for people: names, areas and boxes."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool
from torch import Tensor

from pem_lightning.inference.regions import Box


class FoundSegment(NamedTuple):
    """One segment of a panoptic result.

    Attributes:
        id: the value of its pixels in the id map.
        class_id: contiguous class index.
        name: of the class.
        is_thing: whether the class is countable.
        score: confidence in [0, 1].
        area: pixels.
        box: left, top, right and bottom in pixels; right and bottom are the first ones outside.
    """

    id: int
    class_id: int
    name: str
    is_thing: bool
    score: float | None
    area: int
    box: Box


class FoundInstance(NamedTuple):
    """One object of an instance result; its mask may overlap those of others.

    Attributes:
        mask: its pixels, at the image's size.
        class_id: contiguous class index.
        name: of the class.
        score: class probability times the mean mask probability inside the mask, in [0, 1].
        area: pixels.
        box: left, top, right and bottom in pixels; right and bottom are the first ones outside.
    """

    mask: Bool[Tensor, "height width"]
    class_id: int
    name: str
    score: float
    area: int
    box: Box
