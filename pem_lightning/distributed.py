"""Between the processes of a training: one per device, over all nodes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there are several processes that can talk to one another."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes, in one collective that the host does not wait for.

    Args:
        values: of the same shape in every process; changed in place.

    Returns:
        The mean; with one process the values themselves.
    """
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather(value: Any) -> list[Any]:
    """The values of all processes by rank, on every one of them. All must call it.

    Args:
        value: small plain data.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
