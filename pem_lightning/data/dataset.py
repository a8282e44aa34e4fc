"""What every data set has in common: named items, the files behind them, and how one is read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

from torch.utils.data import Dataset

from pem_lightning.errors import UserError
from pem_lightning.types import DatasetInfo, Sample

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
