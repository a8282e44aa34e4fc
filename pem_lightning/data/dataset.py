"""What every data set has in common: named items, the files behind them, and how one is read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from torch.utils.data import Dataset

from pem_lightning.errors import UserError
from pem_lightning.types import DatasetInfo, Sample

log = logging.getLogger(__name__)

SampleTransform = Callable[[Sample], Sample]
OnError = Literal["stop", "skip"]


class SegmentationDataset(Dataset[Sample], ABC):
    """One split of a data set, in the order of its names.

    A subclass finds its files when it is constructed, without opening them, and implements `files` and `read`.

    Attributes:
        info: the classes.
        names: of the items, unique.

    Args:
        info: the classes.
        names: of the items, unique.
        transform: applied to every sample that is read.
        on_error: what an unreadable file does: "stop" raises its error, "skip" logs it and takes the next item.
    """

    def __init__(
        self,
        info: DatasetInfo,
        names: Sequence[str],
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        if on_error not in ("stop", "skip"):
            raise UserError(f"dataset.on_error={on_error}: choose stop or skip")
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
                if self.on_error == "stop":
                    raise
                log.warning("skipped: %s", error)
            else:
                return self.transform(sample) if self.transform else sample
        raise UserError(f"none of the {len(self)} items can be read: look at the warnings above")
