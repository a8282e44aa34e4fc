"""What every data set has in common: named items, the files behind them, and how one is read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from torch.utils.data import Dataset

from pem_lightning.data.reading import read_map, read_rgb
from pem_lightning.errors import UserError
from pem_lightning.types import DatasetInfo, Sample, Segment

log = logging.getLogger(__name__)

SampleTransform = Callable[[Sample], Sample]
OnError = Literal["stop", "skip", "collect"]


class SegmentationDataset(Dataset[Sample], ABC):
    """One split of a data set, in the order of its names.

    A subclass finds its files when it is constructed, without opening them, and implements `files` and `read`.

    Attributes:
        info: the classes.
        names: of the items, unique.
        problems: what is wrong with the files found, one message with its cure each (only with `on_error="collect"`).
        common_files: those that describe several items, such as one JSON for all.
        image_ids: the ids that official files give to images, by name, where those are not the names themselves.
        prediction_suffix: what a benchmark wants the names of prediction files to end in, before ".png".

    Args:
        info: the classes.
        names: of the items, unique.
        problems: what the subclass found wrong, such as images without annotation.
        transform: applied to every sample that is read.
        on_error: what `problems` and unreadable files do: "stop" raises the first, "skip" logs them and takes the next
            item instead, "collect" keeps `problems` for whoever asks and raises on reading.

    Raises:
        UserError: there are problems, and `on_error` says "stop".
    """

    common_files: tuple[Path, ...] = ()
    image_ids: Mapping[str, str | int] = MappingProxyType({})
    prediction_suffix = ""

    def __init__(
        self,
        info: DatasetInfo,
        names: Sequence[str],
        problems: Sequence[str] = (),
        *,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        if on_error not in get_args(OnError):
            raise UserError(f"dataset.on_error={on_error}: choose {' or '.join(get_args(OnError))}")
        if problems and on_error == "stop":
            more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
            raise UserError(problems[0] + more)
        if on_error == "skip":
            for problem in problems:
                log.warning("left out: %s", problem)
        self.problems = list(problems)
        self.info = info
        self.names = list(names)
        self.transform = transform
        self.on_error = on_error

    @abstractmethod
    def files(self, index: int) -> tuple[Path, ...]:
        """The files of one item: its image first, then its annotation."""

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Decode one item as it is on disk.

        Raises:
            UserError: a file cannot be read or does not fit the others; the message names it and the cure.
        """

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read and transform one item.

        Raises:
            IndexError: there is no such item; plain iteration ends by it.
            UserError: it cannot be read, or with `on_error="skip"` no item can.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for shift in range(len(self)):
            try:
                sample = self.read((index + shift) % len(self))
            except UserError as error:
                if self.on_error != "skip":
                    raise
                log.warning("skipped: %s", error)
            else:
                return self.transform(sample) if self.transform else sample
        raise UserError(f"none of the {len(self)} items can be read: look at the warnings above")


def pair_files(
    images: Mapping[str, Path], annotations: Mapping[str, Path], cure: str
) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Bring images and annotations of the same name together.

    Args:
        images: by name.
        annotations: by name.
        cure: what the user can do about a file that lacks its counterpart.

    Returns:
        The pairs by name, in the order of their names, and one problem for every other file.
    """
    problems = [f"{images[name]} has no annotation: {cure}" for name in sorted(images.keys() - annotations.keys())]
    problems += [f"{annotations[name]} has no image: {cure}" for name in sorted(annotations.keys() - images.keys())]
    return {name: (images[name], annotations[name]) for name in sorted(images.keys() & annotations.keys())}, problems


def read_pair(
    image: Path, annotation: Path, cure: str, colored: bool = False
) -> tuple[UInt8[np.ndarray, "height width 3"], np.ndarray]:
    """Read an image with its annotation.

    Args:
        image: any photograph.
        annotation: a map of the same size.
        cure: what the user can do about a broken file.
        colored: the map has RGB pixels instead of one number each.

    Returns:
        RGB, and the map's values as they are stored.

    Raises:
        UserError: a file cannot be read, or the map has another size or other channels.
    """
    pixels, values = read_rgb(image, cure), read_map(annotation, cure)
    expected = pixels.shape if colored else pixels.shape[:2]
    if values.shape != expected:
        raise UserError(
            f"{annotation} is {_described(values)}, its image {image.name} needs "
            f"{_described(np.empty(expected, np.uint8))}: {cure}"
        )
    return pixels, values


def make_sample(
    image: UInt8[np.ndarray, "height width 3"],
    panoptic: Int32[np.ndarray, "height width"],
    segments: Sequence[Segment],
    name: str,
) -> Sample:
    """A sample from arrays as they are decoded."""
    # The channels are a view on the file's own pixel order, which spares a copy of the full image.
    return Sample(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(panoptic), tuple(segments), name)


def _described(values: np.ndarray) -> str:
    height, width, *channels = values.shape
    return f"a {width}x{height} map of {channels[0] if channels else 1} channel(s)"
