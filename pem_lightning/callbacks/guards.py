"""What ends a training before its last step: losses that are not finite, a metric that does not get better any more."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from pem_lightning.data import SegmentationDataModule
from pem_lightning.files import write_or_warn
from pem_lightning.training.distributed import SharedFlag, all_gather
from pem_lightning.types import Batch, UserError

log = logging.getLogger(__name__)


class NonFiniteLoss(Callback):
    """Skips a step whose loss is infinite or NaN on any device, and stops the training after too many of them.

    Batch, losses and random states of the step go into `non_finite_step_<step>.pt`, one file per device, which
    `torch.load` reads with `weights_only`. A skipped step counts as a step, so that schedule, data and checkpoints stay
    in line; a run may skip `max_bad_steps`, see `train/bad_steps`. Infinite float16 gradients of a finite loss are
    left to the loss scale.
    """

    def __init__(self, directory: str | Path, max_bad_steps: int = 0) -> None:
        self.directory = Path(directory)
        self.max_bad_steps = max_bad_steps
        self.bad_steps = 0
        self._flag = SharedFlag()
        self._bad = False
        self._generators: dict[str, Any] = {}
        self._buffers: list[Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the random states, and the buffers, which a forward pass changes."""
        self._bad = False
        self._generators = {"torch": torch.get_rng_state()}
        if pl_module.device.type == "cuda":
            self._generators["cuda"] = torch.cuda.get_rng_state(pl_module.device)  # lives on the host: no waiting
        if self.max_bad_steps > self.bad_steps:
            buffers = list(pl_module.buffers())
            if len(self._buffers) != len(buffers):
                self._buffers = [torch.empty_like(buffer) for buffer in buffers]
            for kept, buffer in zip(self._buffers, buffers, strict=True):
                kept.copy_(buffer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Ask whether the loss is finite; the answer is read later, so that the host need not wait here."""
        self._flag.tell(~loss.detach().isfinite())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Drop the gradients of a bad step, so that the optimiser changes nothing."""
        self._bad = self._flag.read()
        plugin = trainer.precision_plugin
        scales_loss = isinstance(plugin, MixedPrecision) and plugin.scaler is not None
        if self._bad and not scales_loss:  # a loss scale skips the step itself, and must see the gradients
            optimizer.zero_grad(set_to_none=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Save what led to a bad step; restore the buffers or stop.

        Raises:
            UserError: there are more such steps than `max_bad_steps`.
        """
        if not self._bad:
            return
        self.bad_steps += 1
        step = trainer.global_step
        files = _files(trainer, batch)
        content = {
            "step": step,
            "names": list(batch.names),
            "files": files,
            "images": [image.cpu() for image in batch.images],
            "labels": [target.labels.cpu() for target in batch.targets],
            "masks": [target.masks.cpu() for target in batch.targets],
            "losses": {k: v.detach().cpu() for k, v in trainer.callback_metrics.items() if k.startswith("train/")},
            "generators": self._generators,
        }
        rank = f"_device_{trainer.global_rank}" if trainer.world_size > 1 else ""
        path = self.directory / f"non_finite_step_{step:06d}{rank}.pt"
        file = io.BytesIO()
        torch.save(content, file)
        write_or_warn(path, file.getvalue())
        everywhere = [name for part in all_gather(files) for name in part]
        message = f"the loss of step {step} is not finite (images {', '.join(everywhere)})"
        if self.bad_steps > self.max_bad_steps:
            raise UserError(
                f"{message}: see torch.load('{path}'), and resume with a lower learning rate, another precision, "
                "or recipe.max_bad_steps to skip such steps"
            )
        for kept, buffer in zip(self._buffers, pl_module.buffers(), strict=True):
            buffer.copy_(kept)
        pl_module.log("train/bad_steps", float(self.bad_steps), batch_size=1, rank_zero_only=True)
        log.warning("%s: SKIPPED, %d of at most %d; see %s", message, self.bad_steps, self.max_bad_steps, path)

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"bad_steps": self.bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count."""
        self.bad_steps = state_dict["bad_steps"]


def early_stopping(monitor: str, patience: int | None) -> Callback:
    """The callback for `callbacks.early_stopping`; None never stops.

    Args:
        monitor: name of a metric of which more is better.
        patience: so many validations without a better one end the training.

    Raises:
        UserError: the patience is not at least 1.
    """
    if patience is None:
        return Callback()
    if not isinstance(patience, int) or patience < 1:
        raise UserError(f"callbacks.early_stopping.patience={patience}: choose a number of validations, or null")
    # A metric that is not a number yet is no better one, but no reason to stop either.
    return ResumableEarlyStopping(monitor, patience=patience, mode="max", verbose=True, check_finite=False)


class ResumableEarlyStopping(EarlyStopping):
    """Lightning's, for trainings that are resumed: after it has stopped one, and with another patience."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing more if the training had been stopped."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
            log.info("no better %s in %d validations: nothing to do", self.monitor, self.wait_count)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count, with this run's patience."""
        super().load_state_dict({**state_dict, "patience": self.patience})


def _files(trainer: Trainer, batch: Batch) -> list[str]:
    """The images' files if the data set knows them, otherwise their names."""
    datamodule = getattr(trainer, "datamodule", None)
    if not isinstance(datamodule, SegmentationDataModule):
        return list(batch.names)
    dataset = datamodule.train_dataset
    return [str(dataset.files(dataset.names.index(name))[0]) for name in batch.names]
