"""Between the processes of a training: one per device, over all nodes."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes, in one collective that the host does not wait for.

    Args:
        values: of the same shape in every process; changed in place.

    Returns:
        The mean; with one process the values themselves.
    """
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
