"""Loading, the same for every data set: loaders, sampling, collation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from pem_lightning.data.dataset import SampleTransform, SegmentationDataset
from pem_lightning.data.targets import Task, build_target, check_task
from pem_lightning.errors import UserError
from pem_lightning.types import Batch, DatasetInfo, Sample


def collate_train(samples: Sequence[Sample], task: Task) -> Batch:
    """Images with the targets of a task. Runs in the loader's workers, so that cutting out masks costs no step time."""
    return Batch([s.image for s in samples], [build_target(s, task) for s in samples], [])


def collate_eval(samples: Sequence[Sample]) -> Batch:
    """Images with their whole samples, whose annotation keeps its native size."""
    return Batch([s.image for s in samples], [], list(samples))


class SegmentationDataModule(LightningDataModule, ABC):
    """Everything about loading that does not depend on the data set.

    A subclass sets `info` and implements `make_dataset`; where files are made or fetched it also implements
    `prepare_data`. Images stay uint8 in their own sizes: the model normalises and pads them.

    Args:
        task: "panoptic", "semantic" or "instance"; decides the training targets.
        batch_size: training images per device.
        train_transform: augmentation.
        eval_transform: resizing of validation images.
        num_workers: loading processes per device; 0 loads in the main process.
        eval_batch_size: validation images per device.

    Raises:
        UserError: the task is unknown, or a number is out of range.
    """

    info: ClassVar[DatasetInfo]

    def __init__(
        self,
        *,
        task: Task,
        batch_size: int,
        train_transform: SampleTransform,
        eval_transform: SampleTransform,
        num_workers: int = 4,
        eval_batch_size: int = 1,
    ) -> None:
        super().__init__()
        check_task(task)
        if min(batch_size, eval_batch_size) < 1 or num_workers < 0:
            raise UserError("batch_size and eval_batch_size must be at least 1, num_workers at least 0")
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self._datasets: dict[str, SegmentationDataset] = {}

    @abstractmethod
    def make_dataset(self, split: str, transform: SampleTransform) -> SegmentationDataset:
        """One split, "train" or "val", as a dataset."""

    def setup(self, stage: str | None = None) -> None:
        """Find the files of the splits that the stage needs.

        Raises:
            UserError: files are missing, or there are fewer training images than one batch takes.
        """
        if stage in (None, "fit") and "train" not in self._datasets:
            dataset = self.make_dataset("train", self.train_transform)
            if (count := len(dataset)) < self.batch_size:
                raise UserError(f"{count} training images make no batch of {self.batch_size}: lower recipe.batch_size")
            self._datasets["train"] = dataset
        if "val" not in self._datasets:
            self._datasets["val"] = self.make_dataset("val", self.eval_transform)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of equal length; yields `Batch` with targets."""
        collate = partial(collate_train, task=self.task)
        return self._loader("train", self.batch_size, collate, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """All validation images in order; yields `Batch` with samples."""
        return self._loader("val", self.eval_batch_size, collate_eval)

    def _loader(
        self,
        split: str,
        batch_size: int,
        collate: Callable[[Sequence[Sample]], Batch],
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> DataLoader[Sample]:
        return DataLoader(
            self._datasets[split],
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            collate_fn=collate,
            num_workers=self.num_workers,
            # Training counts iterations, not epochs: new workers at every end of a small data set would stall it.
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
