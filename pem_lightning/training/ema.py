"""An exponential moving average of the weights, which often segments better than the last step's."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pem_lightning.types import UserError


def average_weights(decay: float | None) -> Callback:
    """The callback for `recipe.ema_decay`; None averages nothing.

    Raises:
        UserError: the decay is not between 0 and 1.
    """
    if decay is None:
        return Callback()
    if not 0 < decay < 1:
        raise UserError(f"recipe.ema_decay={decay}: choose a share such as 0.9998, or null for no average")
    return EMA(decay)


class EMA(WeightAveraging):
    """Lightning's averaging: validation runs the averaged weights, and checkpoints have them as `state_dict`.

    The first updates keep less of the average, (1 + n) / (10 + n) after n of them, so that it does not cling to the
    random start. Counters of batch normalisation are copied.

    Args:
        decay: share of the average that an update keeps.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = decay

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the module to its device; the count stays on the host, which need not wait for it then."""
        average: Any = self._average_model
        average.module.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow a step of the optimiser."""
        if trainer.global_step <= self._latest_update_step:
            return
        self._latest_update_step = trainer.global_step
        update_average(self._average_model, pl_module, self.decay)


@torch.no_grad()
def update_average(average: Any, module: nn.Module, decay: float) -> None:
    """Let an `AveragedModel` follow its module. (Its own `update_parameters` makes the host wait for the device.)"""
    count = int(average.n_averaged)
    decay = min(decay, (1 + count) / (10 + count))
    tensors = (chain(module.parameters(), module.buffers()) for module in (average.module, module))
    pairs = list(zip(*tensors, strict=True))
    averages, values = zip(*[pair for pair in pairs if pair[0].is_floating_point()], strict=True)
    get_ema_multi_avg_fn(decay)(averages, values, count)
    for target, value in pairs:
        if not target.is_floating_point():
            target.copy_(value)
    average.n_averaged += 1
