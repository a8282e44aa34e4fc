"""Which device loads which items in which order, and the seed that each is augmented with.

The seed travels with the item's index, so that a run repeats exactly with any number of workers, and all devices
together load the same batches with any number of devices. The samplers are PyTorch's `DistributedSampler` by type:
Lightning would share out anew what any other kind yields.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler

from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.types import Sample


class SampleKey(NamedTuple):
    """The index of an item, and the seed of everything that is drawn while it is read and transformed."""

    item: int
    seed: int


class TrainSampler(DistributedSampler[SampleKey]):
    """Every item once an epoch, in random order; devices get equal, disjoint parts, and a remainder is left out.

    Every iteration is another epoch; Lightning says which by `set_epoch`. `seed` must be the same on all devices.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), world_size, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[SampleKey]:
        self.epoch += 1
        return self._draw(self.epoch - 1)

    def __len__(self) -> int:
        return self.length // self.num_replicas

    def _draw(self, epoch: int) -> Iterator[SampleKey]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.length)
        seeds = generator.integers(2**63 - 1, size=self.length)
        mine = slice(self.rank, self.length // self.num_replicas * self.num_replicas, self.num_replicas)
        return map(SampleKey, order[mine].tolist(), seeds[mine].tolist())


class EndlessSampler(TrainSampler):
    """One epoch of `TrainSampler` after the other without an end, after `start` batches that were drawn before.

    So a run goes on exactly where another stopped, and loads no batch in order to skip it. Every epoch leaves out what
    makes no full batch of all devices; `batch_size` is that of one device.
    """

    def __init__(
        self, length: int, seed: int, rank: int = 0, world_size: int = 1, *, batch_size: int, start: int = 0
    ) -> None:
        super().__init__(length, seed, rank, world_size)
        self.batch_size = batch_size
        self.batches_per_epoch = length // world_size // batch_size
        self.start = start

    def __iter__(self) -> Iterator[SampleKey]:
        first, done = divmod(self.start, self.batches_per_epoch)
        for epoch in count(first):
            yield from islice(self._draw(epoch), done * self.batch_size, self.batches_per_epoch * self.batch_size)
            done = 0

    def __len__(self) -> int:
        raise TypeError("an endless sampler has no length")  # so that a loader has none either


class EvalSampler(DistributedSampler[SampleKey]):
    """Every item exactly once over all devices, in order; no device repeats one to get as many as the others."""

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[SampleKey]:
        return (SampleKey(index, index) for index in self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class SeededDataset(Dataset[Sample]):
    """A data set by `SampleKey`s: whatever an item draws from PyTorch's generator depends on its key alone."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample:
        with torch.random.fork_rng(devices=()):  # without workers it is the generator that training draws from
            torch.default_generator.manual_seed(key.seed)
            return self.dataset[key.item]
