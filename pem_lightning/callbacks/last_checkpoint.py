"""The newest state of a training as a file, and the one before; stopping when a signal asks for it."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from pem_lightning.interrupts import LAST, PREVIOUS, Interrupted, StopSignals, requeue, resume_command
from pem_lightning.shared_flag import SharedFlag

log = logging.getLogger(__name__)

_NEXT = "last-next.ckpt"
"""A file that is not the newest yet; a killed run leaves it behind."""


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` and, in case that is damaged, the one before as `last-previous.ckpt`.

    It saves between two steps, when the step before is in the logs and its validation is over; also before and after a
    validation, because that takes long; and at the end. When a signal asks to stop (see `StopSignals`), it saves and
    raises `Interrupted`; a validation is given up for that on a single device.

    Args:
        dirpath: folder for the files.
        every_n_train_steps: how often to save.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int) -> None:
        self.dirpath = Path(dirpath)
        self.every_n_train_steps = every_n_train_steps
        self._signals = StopSignals()
        self._stop = SharedFlag()
        self._saved_step = 0
        self._validated = False  # since the last save
        self._last_is_ours = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals; look where this run comes from."""
        self._signals.install()
        self._saved_step = trainer.global_step
        resumed = trainer.ckpt_path
        self._last_is_ours = resumed is not None and _same(Path(resumed), self.dirpath / LAST)
        if trainer.is_global_zero:
            (self.dirpath / _NEXT).unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save if it is time, stop if someone asks for it.

        Raises:
            Interrupted: a signal came.
        """
        step, stop = trainer.global_step, self._stop_is_agreed(trainer, pl_module)
        due = stop or self._validated or step % self.every_n_train_steps == 0
        if due and step > 0 and (step != self._saved_step or self._validated):
            self._save(trainer)
        if stop:
            self._leave(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save before it; after the last step there would be no training to resume."""
        if trainer.state.fn == "fit" and trainer.global_step not in (self._saved_step, trainer.max_steps):
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Give the validation up if a signal came and it is saved that it is due.

        Raises:
            Interrupted: so it is.
        """
        # Several processes do not get to the same image at the same time: they finish.
        if self._signals.received and trainer.world_size == 1 and trainer.global_step == self._saved_step:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note it, for the next save."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, before anything is done to the weights."""
        if trainer.fit_loop.done and (trainer.global_step != self._saved_step or self._validated):
            self._save(trainer, publish=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the end be `last.ckpt` only when the results are written: until then there is something to resume."""
        self._publish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If writing the results failed, keep the training all the same."""
        self._publish(trainer)
        self._signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave signals to others."""
        self._signals.remove()

    def _stop_is_agreed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        if trainer.world_size == 1:
            return self._signals.received is not None
        stop = self._stop.read()  # what was told at the step before, which every process knows by now
        self._stop.tell(torch.full((), self._signals.received is not None, device=pl_module.device))
        return stop

    def _save(self, trainer: Trainer, publish: bool = True) -> None:
        for logger in trainer.loggers:
            logger.save()  # a killed run keeps its curves up to here
        trainer.save_checkpoint(self.dirpath / _NEXT, weights_only=False)
        self._saved_step, self._validated = trainer.global_step, False
        if publish:
            self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        """Rename: the newest becomes the one before, the next the newest. There is a whole one at every moment."""
        last, previous, following = (self.dirpath / name for name in (LAST, PREVIOUS, _NEXT))
        if not trainer.is_global_zero or not following.exists():
            return  # nothing was saved, or it could not be written, which was said
        try:
            if self._last_is_ours:
                _link(last, previous)
            elif not (trainer.ckpt_path is not None and _same(Path(trainer.ckpt_path), previous)):
                previous.unlink(missing_ok=True)  # of another training
            following.replace(last)
            self._last_is_ours = True
        except OSError as error:
            log.warning("CANNOT REPLACE %s (%s): training goes on, and the next save tries again", last, error.strerror)

    def _leave(self, trainer: Trainer) -> None:
        number = self._signals.received or signal.SIGTERM  # that another process got
        if trainer.is_global_zero:
            if number == signal.SIGUSR1:
                log.warning("%s", requeue())
            log.warning(
                "stopped by %s at step %d; to go on: %s",
                signal.Signals(number).name,
                trainer.global_step,
                resume_command(self.dirpath / LAST),
            )
        raise Interrupted(number)


def _same(a: Path, b: Path) -> bool:
    return a.absolute() == b.absolute()


def _link(source: Path, target: Path) -> None:
    """Give a file a second name in place of an old file; without hard links, rename it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            source.replace(target)
