"""What callbacks of several processes tell one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather(value: Any) -> list[Any]:
    """The values of all processes by rank, on every one of them. All must call it.

    Args:
        value: small plain data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
