"""Averaged weights during training: made after every step, validated instead of the raw ones, saved beside them."""

from __future__ import annotations

import logging
from typing import Any

from lightning import Callback, LightningModule, Trainer

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.training.averaging import AveragedNetwork
from pem_lightning.types import UserError

log = logging.getLogger(__name__)


class AverageWeights(Callback):
    """Gives a `PEMModule` its averaged network, which the module validates and saves.

    Args:
        decay: see `AveragedNetwork`; None does nothing.

    Raises:
        UserError: the decay is no share.
    """

    def __init__(self, decay: float | None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"recipe.ema_decay={decay}: choose a share such as 0.9998, or null for no average")
        self.decay = decay
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the network before training."""
        if stage == "fit" and self.decay is not None:
            module: Any = pl_module
            module.averaged = AveragedNetwork(module.network, self.decay)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the average of a resumed training; one that had none starts with its weights."""
        module: Any = pl_module
        if module.averaged is None:
            return
        state = checkpoint[CHECKPOINT_KEY].get("averaged")
        if state is None:
            log.warning("the checkpoint has no averaged weights: the average begins with its raw ones")
            state = {"weights": module.network.state_dict(), "updates": 0}
        module.averaged.load_state_dict(state)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy where the network is by now."""
        module: Any = pl_module
        if module.averaged is not None:
            module.averaged.network.to(module.device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step that a resumed training goes on with."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Follow a step of the optimiser, if there was one."""
        module: Any = pl_module
        if module.averaged is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            module.averaged.update(module.network)
