"""Which items are loaded in which order by which device, and the seed that each is augmented with.

The seed travels with the item's index instead of coming from a worker's own generator. So a run repeats exactly with
any number of workers, and the batches over all devices together are the same with any number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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


# Both samplers are PyTorch's DistributedSampler by type, because Lightning shares out anew what any other kind yields.


class TrainSampler(DistributedSampler[SampleKey]):
    """Every item once an epoch, in random order; devices get equal, disjoint parts, and a remainder is left out.

    Every iteration is another epoch; Lightning says which by `set_epoch`.

    Args:
        length: number of items.
        seed: of order and augmentation; the same on all devices.
        rank: number of this device.
        world_size: number of devices.
    """

    def __init__(self, length: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), world_size, rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.length = length

    def __iter__(self) -> Iterator[SampleKey]:
        """Draw one epoch."""
        self.epoch += 1
        return self._draw(self.epoch - 1)

    def __len__(self) -> int:
        """Number of this device's items."""
        return self.length // self.num_replicas

    def _draw(self, epoch: int) -> Iterator[SampleKey]:
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(self.length)
        seeds = generator.integers(2**63 - 1, size=self.length)
        mine = slice(self.rank, self.length // self.num_replicas * self.num_replicas, self.num_replicas)
        return map(SampleKey, order[mine].tolist(), seeds[mine].tolist())


class EndlessSampler(TrainSampler):
    """One epoch of `TrainSampler` after the other without an end, from any batch on.

    So training is one stream of batches, and where it stands is their number alone: a run goes on exactly where another
    one stopped, and loads no batch in order to skip it. Every epoch leaves out what makes no full batch of all devices.

    Args:
        length: number of items.
        seed: of order and augmentation; the same on all devices.
        rank: number of this device.
        world_size: number of devices.
        batch_size: items of one device in one batch.
        start: number of batches that were drawn before.
    """

    def __init__(
        self, length: int, seed: int, rank: int = 0, world_size: int = 1, *, batch_size: int, start: int = 0
    ) -> None:
        super().__init__(length, seed, rank, world_size)
        self.batch_size = batch_size
        self.batches_per_epoch = length // world_size // batch_size
        self.start = start

    def __iter__(self) -> Iterator[SampleKey]:
        """Draw epoch after epoch; what Lightning says by `set_epoch` is not asked."""
        first, done = divmod(self.start, self.batches_per_epoch)
        for epoch in count(first):
            yield from islice(self._draw(epoch), done * self.batch_size, self.batches_per_epoch * self.batch_size)
            done = 0

    def __len__(self) -> int:
        """Refuse, so that a loader knows that it has no length either.

        Raises:
            TypeError: always.
        """
        raise TypeError("an endless sampler has no length")


class EvalSampler(DistributedSampler[SampleKey]):
    """Every item exactly once over all devices, in order; no device repeats one to get as many as the others.

    Args:
        length: number of items.
        rank: number of this device.
        world_size: number of devices.
    """

    def __init__(self, length: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(length), world_size, rank, shuffle=False)  # type: ignore[arg-type]
        self.indices = range(rank, length, world_size)

    def __iter__(self) -> Iterator[SampleKey]:
        """Go through this device's items; each one's seed is its index."""
        return (SampleKey(index, index) for index in self.indices)

    def __len__(self) -> int:
        """Number of this device's items."""
        return len(self.indices)


class SeededDataset(Dataset[Sample]):
    """A data set by `SampleKey`s: whatever an item draws from PyTorch's generator depends on its key alone."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample:
        """Read and transform one item."""
        with _seeded(key.seed):
            return self.dataset[key.item]


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator, and restore it: without workers it is the one that training draws from."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
