"""The types that everything shares and that need no PyTorch; `types` has them all."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from pem_lightning.shapes import Bool, Int32, UInt8

VOID_ID = 0
"""Segment id of unlabelled pixels in every panoptic id map."""

IGNORE_INDEX = 255
"""Class of unlabelled pixels in every class map."""


class UserError(Exception):
    """A mistake of the user. The message is one line that names the cure; the command line exits with code 2."""

    def __str__(self) -> str:
        """One line: without line breaks in names of files, and the traceback that PyTorch adds in a loader's worker."""
        return " ".join(super().__str__().split("UserError: ")[-1].splitlines())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest known word, for the end of a message; empty if nothing is similar."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


Task = Literal["panoptic", "semantic", "instance"]


def check_task(task: str) -> None:
    """Raises `UserError` for an unknown task."""
    if task not in get_args(Task):
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(get_args(Task))}")


class Segment(NamedTuple):
    """One segment of a panoptic map: its id there, never `VOID_ID`, and its class index, 0 to K-1.

    Only ground truth has crowds, groups of things that are not told apart; only predictions have a score in [0, 1].
    """

    id: int
    class_id: int
    is_thing: bool
    is_crowd: bool = False
    score: float | None = None


class Instance(NamedTuple):
    """One detected object."""

    mask: Bool[Any, "height width"]  # at the output size; a tensor, or from `deploy.Runtime` an array
    class_id: int
    score: float  # class probability times the mean mask probability inside the mask


class Result(NamedTuple):
    """The result of one image; what the task does not fill is empty. Maps are tensors, or arrays as of an instance."""

    semantic: Int32[Any, "height width"] | None = None  # class indices
    panoptic: Int32[Any, "height width"] | None = None  # segment ids, `VOID_ID` where no segment is
    segments: tuple[Segment, ...] = ()  # what the ids mean
    instances: tuple[Instance, ...] = ()  # may overlap

    def convert(self, maps: Callable[[Any], Any]) -> Result:
        """The same with every map and mask replaced by a function of it."""
        return self._replace(
            semantic=None if self.semantic is None else maps(self.semantic),
            panoptic=None if self.panoptic is None else maps(self.panoptic),
            instances=tuple(i._replace(mask=maps(i.mask)) for i in self.instances),
        )

    def cpu(self) -> Result:
        """The same with all tensors on the CPU."""
        return self.convert(lambda tensor: tensor.cpu())


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
        """K, without "no object"."""
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
