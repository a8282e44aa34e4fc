"""How the images of one step are shared out: between devices, and on each between passes through the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pem_lightning.types import Batch, UserError

SMALLEST = 2
"""Images in a pass: context-based self-modulation normalises one value per image and channel over the batch."""


class BatchSplit(NamedTuple):
    """A step's share of one device.

    Attributes:
        per_device: images.
        micro_batches: equal parts that they run through the network in, one after the other.
    """

    per_device: int
    micro_batches: int


def split_batch(global_batch_size: int, devices: int, micro_batch_size: int | None = None) -> BatchSplit:
    """Share a step's images out: equally between devices, and on each between as few equal micro-batches as fit.

    Args:
        global_batch_size: images of one step.
        devices: number of processes, over all nodes.
        micro_batch_size: largest micro-batch; None for no limit.

    Raises:
        UserError: there is no such split; the message names the nearest that there are.
    """
    if micro_batch_size is not None and micro_batch_size < SMALLEST:
        raise UserError(
            f"recipe.micro_batch_size={micro_batch_size}: choose at least {SMALLEST}, which batch normalisation needs"
        )
    split = _find(global_batch_size, devices, micro_batch_size)
    if split is None:
        raise UserError(_explain(global_batch_size, devices, micro_batch_size))
    return split


def micro_batches_of(batch: Batch, count: int) -> Iterator[Batch]:
    """Cut a training batch into equal parts, in order.

    Args:
        batch: a device's share of a step.
        count: of parts; divides the number of images.
    """
    length = len(batch.images) // count
    for start in range(0, len(batch.images), length):
        part = slice(start, start + length)
        yield Batch(batch.images[part], batch.targets[part], [], batch.names[part])


def _find(images: int, devices: int, limit: int | None) -> BatchSplit | None:
    share, rest = divmod(images, devices)
    if rest or share < SMALLEST:
        return None
    for parts in range(1, share // SMALLEST + 1):
        if share % parts == 0 and (limit is None or share // parts <= limit):
            return BatchSplit(share, parts)
    return None


def _explain(images: int, devices: int, limit: int | None) -> str:
    share, rest = divmod(images, devices)
    start = f"recipe.global_batch_size={images}"
    where = "1 device" if devices == 1 else f"{devices} devices"
    if rest:
        problem = f"{start} cannot be shared out equally between {where}"
    elif share < SMALLEST:
        problem = f"{start} is too small for {where}: batch normalisation needs {SMALLEST} images on each"
    else:
        problem = f"{start} leaves {share} images on {where}, which have no equal parts of {SMALLEST} to {limit}"
        problem += " (recipe.micro_batch_size)"
    sizes = _around(images, range(SMALLEST * devices, 2 * images + 4 * devices), lambda n: _find(n, devices, limit))
    cures = [f"recipe.global_batch_size={_or(sizes)}"]
    if counts := _around(devices, range(1, images // SMALLEST + 1), lambda n: _find(images, n, limit)):
        cures.append(f"{_or(counts)} device{'s' if counts != [1] else ''}")
    if limit is not None and not rest and share >= SMALLEST:
        larger = next(n for n in range(limit + 1, share + 1) if _find(images, devices, n))
        cures.append(f"recipe.micro_batch_size={larger}")
    return f"{problem}; nearest that can: {', or '.join(cures)}"


def _around(number: int, candidates: range, fits: Callable[[int], object]) -> list[int]:
    """The nearest candidates below and above a number that fit."""
    below = next((n for n in reversed(candidates) if n < number and fits(n)), None)
    above = next((n for n in candidates if n > number and fits(n)), None)
    return [n for n in (below, above) if n is not None]


def _or(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, numbers))
