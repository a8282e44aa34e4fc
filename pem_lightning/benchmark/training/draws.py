"""Random numbers that two paths share although they draw in another order."""

from __future__ import annotations

from math import prod

import torch
from jaxtyping import Float
from torch import Tensor


class SharedDraws:
    """A `losses.UniformSource` that gives the n-th row of so many points the same numbers, whoever asks, and how.

    The straightforward path matches layer by layer and image by image, ours in one pass. Rows of matching, candidates
    and other points differ in length, so each has a stream of its own.

    Args:
        seed: instances of one seed draw the same.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._streams: dict[int, torch.Generator] = {}

    def __call__(self, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "*rows P 2"]:
        """Draw row by row, on the CPU."""
        points = shape[-2]
        if points not in self._streams:
            self._streams[points] = torch.Generator().manual_seed(self.seed + points)
        rows = [torch.rand(shape[-2:], generator=self._streams[points]) for _ in range(prod(shape[:-2]))]
        return torch.stack(rows).view(shape).to(device) if rows else torch.empty(shape, device=device)
