"""A yes or no that all processes have to agree on, without making a GPU wait."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Bool
from torch import Tensor

from pem_lightning.distributed import is_distributed


class SharedFlag:
    """Is up for all processes once one of them has raised it.

    `tell` only queues work on the device, and `read` waits for that work, but for nothing that was queued after it.
    """

    def __init__(self) -> None:
        self._told: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def tell(self, up: Bool[Tensor, ""]) -> None:
        """Say this process's part; all processes must do so equally often.

        Args:
            up: on the device on which the processes meet.
        """
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
