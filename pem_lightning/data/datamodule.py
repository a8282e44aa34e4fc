"""Loading, the same for every data set: loaders, sampling, collation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from pem_lightning.data.cache import CachedDataset
from pem_lightning.data.dataset import OnError, SampleTransform, SegmentationDataset
from pem_lightning.data.sampler import EndlessSampler, EvalSampler, SeededDataset, TrainSampler
from pem_lightning.data.targets import build_target
from pem_lightning.data.transforms import EvalTransform, TrainTransform
from pem_lightning.processes import WorkerLoader
from pem_lightning.types import Batch, DatasetInfo, Sample, Task, UserError, check_task


def collate_train(samples: Sequence[Sample], task: Task, keep_empty: bool = True) -> Batch:
    """Images with the targets of a task. Runs in the loader's workers, so that cutting out masks costs no step time."""
    targets = [build_target(s, task, keep_empty) for s in samples]
    return Batch([s.image for s in samples], targets, [], tuple(s.name for s in samples))


def collate_eval(samples: Sequence[Sample]) -> Batch:
    """Images with their whole samples, whose annotation keeps its native size."""
    return Batch([s.image for s in samples], [], list(samples), tuple(s.name for s in samples))


class SegmentationDataModule(LightningDataModule, ABC):
    """Loaders of a data set's training and validation images.

    A subclass sets `info` and implements `make_dataset`. Images stay uint8 in their own sizes: the model normalises
    and pads them.

    Args:
        task: decides the training targets.
        batch_size, eval_batch_size: images per device.
        train_transform, eval_transform: None for the data set's, see `default_transforms`.
        num_workers: loading processes per device; 0 loads in the main process.
        on_error: what missing and unreadable files do, see `SegmentationDataset`.
        cache: folder for uncompressed copies, see `CachedDataset`; None reads the files themselves.
        keep_empty_targets: train on segments that the crop removed as empty masks, as the authors do, or drop them.

    Raises:
        UserError: the task is unknown, or a number is out of range.
    """

    info: DatasetInfo

    def __init__(
        self,
        root: str | Path,
        task: Task = "panoptic",
        batch_size: int = 32,
        train_transform: SampleTransform | None = None,
        eval_transform: SampleTransform | None = None,
        *,
        num_workers: int = 4,
        eval_batch_size: int = 1,
        on_error: OnError = "stop",
        cache: str | Path | None = None,
        keep_empty_targets: bool = True,
    ) -> None:
        super().__init__()
        check_task(task)
        if min(batch_size, eval_batch_size) < 1 or num_workers < 0:
            raise UserError("batch_size and eval_batch_size must be at least 1, num_workers at least 0")
        self.root = Path(root)
        self.task = task
        self.batch_size = batch_size
        self.train_transform = train_transform or self.default_transforms()[0]
        self.eval_transform = eval_transform or self.default_transforms()[1]
        self.num_workers = num_workers
        self.eval_batch_size = eval_batch_size
        self.on_error = on_error
        self.cache = cache
        self.keep_empty_targets = keep_empty_targets

    @abstractmethod
    def make_dataset(self, split: str, transform: SampleTransform | None) -> SegmentationDataset:
        """One split, "train" or "val", with this `on_error`."""

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """For training and evaluation, where none are given: the paper's for Cityscapes."""
        return TrainTransform(), EvalTransform()

    @cached_property
    def train_dataset(self) -> SegmentationDataset:
        """The training images."""
        return self._open("train", self.train_transform)

    @cached_property
    def val_dataset(self) -> SegmentationDataset:
        """The validation images."""
        return self._open("val", self.eval_transform)

    def setup(self, stage: str | None = None) -> None:
        """Raises `UserError` if files that the stage needs are missing or fewer than one batch takes."""
        if stage in (None, "fit") and (count := len(self.train_dataset)) < self.batch_size:
            raise UserError(
                f"{count} training images make no batch of {self.batch_size}: lower recipe.global_batch_size"
            )
        len(self.val_dataset)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Shuffled batches of equal length, as `Batch` with targets. `lightning.seed_everything` decides on all.

        A trainer without `max_epochs` gets an endless loader, which starts where the trainer stands.
        """
        seed, count, device = torch.initial_seed(), len(self.train_dataset), self._device()
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # devices that were not seeded alike would share wrongly
        if self.trainer is not None and self.trainer.max_epochs == -1:
            done = self.trainer.fit_loop.total_batch_idx + 1
            sampler: TrainSampler = EndlessSampler(count, seed, *device, batch_size=self.batch_size, start=done)
        else:
            sampler = TrainSampler(count, seed, *device)
        collate = partial(collate_train, task=self.task, keep_empty=self.keep_empty_targets)
        return self._loader(self.train_dataset, self.batch_size, sampler, collate, drop_last=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """All validation images in order, as `Batch` with samples."""
        count, (rank, world_size) = len(self.val_dataset), self._device()
        if count < world_size:  # the devices would wait for one another for ever
            raise UserError(f"{count} validation images are too few for {world_size} devices: lower trainer.devices")
        return self._loader(self.val_dataset, self.eval_batch_size, EvalSampler(count, rank, world_size), collate_eval)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Leave a training batch in the host's memory: the model takes its micro-batches from there one by one."""
        if self.trainer is not None and self.trainer.training:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def _open(self, split: str, transform: SampleTransform) -> SegmentationDataset:
        dataset = self.make_dataset(split, transform)
        return dataset if self.cache is None else CachedDataset(dataset, self.cache, self.num_workers)

    def _device(self) -> tuple[int, int]:
        """This device's number, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def _loader(
        self,
        dataset: SegmentationDataset,
        batch_size: int,
        sampler: TrainSampler | EvalSampler,
        collate: Callable[[Sequence[Sample]], Batch],
        **options: Any,
    ) -> DataLoader[Sample]:
        return WorkerLoader(
            SeededDataset(dataset),
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            # Training counts iterations, not epochs: new workers at every end of a small data set would stall it.
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            **options,
        )
