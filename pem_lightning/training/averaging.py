"""An exponential moving average of a network's weights, which often segments better than the last step's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedNetwork:
    """A copy of a network that follows it. It is no module, so that it is no part of one that holds it.

    Lightning's `EMAWeightAveraging` would exchange the weights for every validation, copy the whole module, forget the
    average in checkpoints of weights only, and make the host wait for the device in every step.

    Args:
        network: as training starts.
        decay: share of the average that an update keeps. The first updates keep less, (1 + n) / (10 + n) after n of
            them, so that the average does not cling to the start.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Move parameters and batch normalisation's statistics towards the network's; counters are taken over."""
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(averages, values, self.updates)
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the weights, and how many updates they have seen."""
        return {"weights": self.network.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another average was."""
        self.network.load_state_dict(state["weights"])
        self.updates = state["updates"]


def _tensors(network: nn.Module) -> chain[Tensor]:
    return chain(network.parameters(), network.buffers())
