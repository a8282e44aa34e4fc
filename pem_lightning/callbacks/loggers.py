"""What Lightning's loggers lack: wandb without a login, and one call that shows a picture in all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

log = logging.getLogger(__name__)

SUMMARIES = {"val/*": "max", "train/loss*": "min"}
"""What the table of runs shows of a curve; of all others the last value."""


class OfflineWandbLogger(WandbLogger):
    """Lightning's wandb logger, offline by itself when nobody is logged in or the server does not accept the run.

    With the checkpoint that it is `resumed_from`, a run continues the wandb run in its folder.
    """

    def __init__(self, save_dir: str | Path, *, resumed_from: str | None = None, **kwargs: Any) -> None:
        if resumed_from and kwargs.get("id") is None:
            parts = sorted(Path(save_dir).glob("wandb/*run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
            kwargs["id"] = parts[-1].stem.removeprefix("run-") if parts else None
        self._arguments = {"save_dir": save_dir, **kwargs}
        super().__init__(**self._arguments)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run, which starts with the first call."""
        if self._experiment is not None:
            return self._experiment
        import wandb

        arguments = self._arguments
        mode = arguments.get("mode") or os.environ.get("WANDB_MODE", "online")
        try:
            if mode == "online" and not arguments.get("offline") and not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("nobody is logged in")
            run = super().experiment
        except Exception as error:  # wandb raises many kinds
            log.warning("wandb: the run is OFFLINE (%s): `wandb sync` uploads it later", " ".join(str(error).split()))
            super().__init__(**{**arguments, "mode": "offline"})
            run = super().experiment
        for name, summary in SUMMARIES.items():
            run.define_metric(name, step_metric="trainer/global_step", summary=summary)
        run.log_code(str(Path(__file__).parents[1]))
        return run


def log_picture(
    trainer: Trainer,
    name: str,
    picture: UInt8[np.ndarray, "height width 3"],
    photo: UInt8[np.ndarray, "_ _ 3"] | None = None,
    masks: Mapping[str, Any] | None = None,
) -> None:
    """Show a picture in TensorBoard and Weights & Biases; the latter prefers a photo with its masks if there is one."""
    step = max(trainer.global_step - 1, 0)  # Lightning logs the numbers of the first step as step 0
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            extra = {} if photo is None else {"masks": [masks]}
            logger.log_image(name, [picture if photo is None else photo], step, **extra)
