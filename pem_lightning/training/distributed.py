"""Several devices, one process each: how they share a step's images, and what they tell one another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Bool
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn

from pem_lightning.types import Batch, UserError

MIN_MICRO_BATCH = 2
"""Context-based self-modulation normalises one value per image and channel over the batch."""


class BatchSplit(NamedTuple):
    """One device's share of a step: images, and the equal micro-batches that they run through the network in."""

    per_device: int
    micro_batches: int


def split_batch(global_batch_size: int, devices: int, micro_batch_size: int | None = None) -> BatchSplit:
    """Share a step's images equally between devices, and on each between as few equal micro-batches as fit.

    Args:
        global_batch_size: images of one step.
        devices: number of processes over all nodes.
        micro_batch_size: largest micro-batch; None for no limit.

    Raises:
        UserError: there is no such split; the message names the nearest settings that have one.
    """
    images, limit = global_batch_size, micro_batch_size
    if limit is not None and limit < MIN_MICRO_BATCH:
        raise UserError(
            f"recipe.micro_batch_size={limit}: choose at least {MIN_MICRO_BATCH}, which batch normalisation needs"
        )
    split = _find_split(images, devices, limit)
    if split is not None:
        return split
    share, rest = divmod(images, devices)
    where = "1 device" if devices == 1 else f"{devices} devices"
    sizes = _nearest(images, 2 * images + 4 * devices, lambda n: _find_split(n, devices, limit))
    hints = [f"recipe.global_batch_size={sizes}"]
    if counts := _nearest(devices, images, lambda n: _find_split(images, n, limit)):
        hints.append(f"{counts} device{'' if counts == '1' else 's'}")
    if rest:
        problem = f"cannot be shared out equally between {where}"
    elif share < MIN_MICRO_BATCH:
        problem = f"is too small for {where}: batch normalisation needs {MIN_MICRO_BATCH} images on each"
    else:
        problem = f"leaves {share} images on {where}, which have no equal parts of {MIN_MICRO_BATCH} to {limit}"
        larger = _nearest(limit or 0, share, lambda n: _find_split(images, devices, n))
        hints.append(f"recipe.micro_batch_size={larger}")
    raise UserError(f"recipe.global_batch_size={images} {problem}; nearest that can: {', or '.join(hints)}")


def _find_split(images: int, devices: int, limit: int | None) -> BatchSplit | None:
    share, rest = divmod(images, devices)
    if rest:
        return None
    for parts in range(1, share // MIN_MICRO_BATCH + 1):
        if share % parts == 0 and (limit is None or share // parts <= limit):
            return BatchSplit(share, parts)
    return None


def more_micro_batches(images: int, count: int) -> int | None:
    """The next number of equal micro-batches after `count`; None if they would be too small."""
    return next((n for n in range(count + 1, images // MIN_MICRO_BATCH + 1) if images % n == 0), None)


def _nearest(number: int, largest: int, fits: Callable[[int], object]) -> str:
    """The nearest numbers below and above one that fit: "30 or 33"."""
    below = next((n for n in range(number - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(number + 1, largest + 1) if fits(n)), None)
    return " or ".join(str(n) for n in (below, above) if n is not None)


def micro_batches_of(batch: Batch, count: int) -> Iterator[Batch]:
    """Cut a device's training batch into equal parts, in order; `count` divides the number of images."""
    length = len(batch.images) // count
    for start in range(0, len(batch.images), length):
        part = slice(start, start + length)
        yield Batch(batch.images[part], batch.targets[part], [], batch.names[part])


def is_distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes in place, in one collective that the host does not wait for."""
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def all_gather(value: Any) -> list[Any]:
    """The small plain values of all processes by rank, on each of them. All must call it."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class SharedFlag:
    """Is up for all processes once one has raised it.

    `tell` only queues work on the device; `read` waits for that work, but for nothing that was queued after it.
    """

    def __init__(self) -> None:
        self._told: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def tell(self, up: Bool[Tensor, ""]) -> None:
        """Say this process's part, a tensor on its device. All processes must do so equally often."""
        number = up.detach().to(torch.float32)
        if is_distributed():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if not number.is_cuda:
            self._told.append((number, None))
            return
        copy, arrived = torch.empty((), pin_memory=True), torch.cuda.Event()
        copy.copy_(number, non_blocking=True)
        arrived.record()
        self._told.append((copy, arrived))

    def read(self) -> bool:
        """Whether any process has raised it since the last time."""
        told, self._told = self._told, []
        for _, arrived in told:
            if arrived is not None:
                arrived.synchronize()
        return any(bool(number) for number, _ in told)


class PlainSyncBatchNorm(TorchSyncBatchNorm):
    """Lightning's `sync_batchnorm` for PyTorch's own layers only (on GPUs).

    PyTorch's conversion takes any subclass for a plain layer, and timm's, which hold an activation, would lose it.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert layers in place; parameters and buffers stay the same objects."""
        for name, child in model.named_children():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                model.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                self.apply(child)
        return model
