"""A training that is stopped, or killed at any moment, goes on as if nothing had happened: no bit differs.

Here states are saved and restored. `cli/overrides.py` chooses the checkpoint, `cli/jobs.py` trims the logs that ran
ahead of it, and `data/sampler.py` skips the images that were seen.
"""

from __future__ import annotations

import logging
import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pem_lightning.files import replace_file
from pem_lightning.installation import job_command
from pem_lightning.metrics.evaluator import from_plain, to_plain
from pem_lightning.processes import Interrupted
from pem_lightning.training.distributed import SharedFlag
from pem_lightning.training.module import PEMModule
from pem_lightning.training.signals import StopSignals
from pem_lightning.types import UserError

log = logging.getLogger(__name__)

LAST = "last.ckpt"
PREVIOUS = "last-previous.ckpt"
"""The one before, in case the last is damaged."""
_NEXT = "last-next.ckpt"
"""Written, but not the last yet; a killed run leaves it behind."""


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, NumPy's and PyTorch's generators for one step of one process.

    What a step draws depends on these three numbers alone. So no generator's state has to be kept, and neither a
    validation, nor a picture, nor another number of loader workers changes the training.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]))


class ExactResume(Callback):
    """Adds what Lightning loses when it restores a training with an endless loader (see `EndlessSampler`).

    That is a validation that was due or under way, a count of steps that does not depend on the moment at which the
    checkpoint was made, and the best scores of a folder that was moved.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._validation_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seed that `lightning.seed_everything` set in the first process."""
        self._seed = trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the step."""
        self._validation_due = False
        seed_step(self._seed, trainer.fit_loop.total_batch_idx, trainer.global_rank)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that a checkpoint of now lacks the validation."""
        self._validation_due = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that it does not any more; Lightning makes its checkpoints after this."""
        self._validation_due = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the last validation's numbers, which the end of the run reports; leave out a validation's progress."""
        checkpoint["callbacks"][self.state_key] = {
            "validation_due": self._validation_due,
            "world_size": trainer.world_size,
            "evaluation": to_plain(cast(PEMModule, pl_module).evaluation),
        }
        checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = _progress(0, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put what Lightning is about to read into the one form that it restarts from correctly."""
        callbacks = checkpoint["callbacks"]
        state = callbacks.get(self.state_key, {})
        cast(PEMModule, pl_module).evaluation = from_plain(state.get("evaluation"))
        if state.get("world_size", trainer.world_size) != trainer.world_size:
            rank_zero_warn(
                f"{state['world_size']} devices were used before, {trainer.world_size} are now: the same images in the "
                "same steps, but not the same random points, and sums are rounded otherwise"
            )
        if trainer.max_epochs == -1:
            loops, due = checkpoint["loops"]["fit_loop"], state.get("validation_due", False)
            _set_progress(loops, due, trainer.val_check_interval)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in callbacks and callback.dirpath:
                callbacks[callback.state_key] = _moved(callbacks[callback.state_key], str(callback.dirpath))


def _set_progress(loops: dict[str, Any], validation_due: bool, validation_interval: int | float) -> None:
    """Say "in the middle of the only epoch, so many steps are complete", at whatever moment the checkpoint was made."""
    steps = loops["epoch_loop.batch_progress"]["total"]["processed"]
    validated = steps > 0 and isinstance(validation_interval, int) and steps % validation_interval == 0
    loops["epoch_progress"] = _progress(1, 0)
    loops["epoch_loop.batch_progress"] = _progress(steps, steps)
    # Resumed after a step with validation, `_TrainingEpochLoop.advance` ends that step once more, and counts it.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - validated
    # A validation that has begun is begun anew.
    loops["epoch_loop.val_loop.batch_progress"] = {**_progress(0, 0), "total": _counters(int(validation_due), 0)}


def _progress(started: int, completed: int) -> dict[str, Any]:
    """Lightning's counters, over all epochs and in this one, which are the same for an only epoch."""
    counters = _counters(started, completed)
    return {"total": counters, "current": dict(counters), "is_last_batch": False}


def _counters(started: int, completed: int) -> dict[str, int]:
    return {"ready": started, "started": started, "processed": completed, "completed": completed}


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a `ModelCheckpoint` knows, with its files where they are now, if they are there."""
    if not (Path(folder) / Path(state["best_model_path"]).name).is_file():
        return state

    def move(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    paths = {key: move(state[key]) for key in ("best_model_path", "kth_best_model_path", "last_model_path")}
    best = {move(path): score for path, score in state["best_k_models"].items()}
    return {**state, **paths, "dirpath": folder, "best_k_models": best}


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` and the one before, `last-previous.ckpt`.

    It saves between two steps, when the step before is in the logs and its validation is over; also before and after a
    validation, because that takes long; and at the end. When a signal asks to stop (see `StopSignals`), it saves and
    raises `Interrupted`; a single device gives up a validation for that.

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
        self._last_is_ours = False  # and not of another training in the same folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals; look where this run comes from."""
        self._signals.install()
        self._saved_step = trainer.global_step
        self._last_is_ours = self._resumed_from(trainer, LAST)
        if trainer.is_global_zero:
            (self.dirpath / _NEXT).unlink(missing_ok=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save if it is time, stop if a signal asks for it."""
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

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Give the validation up if a signal came and it is saved that it is due."""
        # Several processes do not get to the same image at the same time: they finish.
        if self._signals.received and trainer.world_size == 1 and trainer.global_step == self._saved_step:
            self._leave(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note it, for the next save."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end, before `EMA` puts the averaged weights into the network."""
        if trainer.fit_loop.done and (trainer.global_step != self._saved_step or self._validated):
            self._save(trainer, publish=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the end be `last.ckpt` only when the results are written: until then there is something to resume."""
        self._publish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If writing the results failed, keep the training all the same; if it was interrupted, resuming repeats it."""
        if isinstance(exception, Exception):
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

    def _resumed_from(self, trainer: Trainer, name: str) -> bool:
        return trainer.ckpt_path is not None and Path(trainer.ckpt_path).absolute() == (self.dirpath / name).absolute()

    def _save(self, trainer: Trainer, publish: bool = True) -> None:
        for logger in trainer.loggers:
            logger.save()  # a killed run keeps its curves up to here
        trainer.save_checkpoint(self.dirpath / _NEXT, weights_only=False)
        self._saved_step, self._validated = trainer.global_step, False
        if publish:
            self._publish(trainer)

    def _publish(self, trainer: Trainer) -> None:
        """Rename: the last becomes the previous, the next the last. There is a whole one at every moment."""
        last, previous, following = (self.dirpath / name for name in (LAST, PREVIOUS, _NEXT))
        if not trainer.is_global_zero or not following.exists():
            return  # nothing was saved, or it could not be written, which was said
        try:
            if self._last_is_ours:
                _link(last, previous)
            elif not self._resumed_from(trainer, PREVIOUS):
                previous.unlink(missing_ok=True)  # of another training
            following.replace(last)
            self._last_is_ours = True
        except OSError as error:
            log.warning("CANNOT REPLACE %s (%s): training goes on, and the next save tries again", last, error.strerror)

    def _leave(self, trainer: Trainer) -> None:
        number = self._signals.received or signal.SIGTERM  # that another process got
        if trainer.is_global_zero:
            stopped, step = signal.Signals(number).name, trainer.global_step
            hint = f"{job_command('train')} resume={self.dirpath / LAST}"
            log.warning("stopped by %s at step %d; to go on: %s", stopped, step, hint)
        raise Interrupted(number)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name in place of an old file; without hard links, rename it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
        temporary.replace(target)
    except OSError:
        with suppress(OSError):
            source.replace(target)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, waits for the disk, and only then takes the old one's place.

    (Lightning's own writes into the system's temporary folder first. From there to another disk the file is copied,
    which a kill leaves half done.) A checkpoint that cannot be written does not end the training, which may find room
    for the next one: the old file stays, and a warning says so.
    """

    def __init__(self) -> None:
        self._failed: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write, or warn."""
        path = Path(path)
        try:
            with replace_file(path, durable=True) as file:
                torch.save(checkpoint, file)
            self._failed.pop(path, None)
        except (OSError, RuntimeError) as error:
            # PyTorch complains about the state in which the disk's own error left its writer.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            reason = self._failed[path] = cause.strerror or str(cause)
            again = "training goes on, the old file is kept, and the next save tries again"
            log.warning("CANNOT WRITE %s (%s): %s", path, reason, again)

    def check(self) -> None:
        """Look back at the end of a training.

        Raises:
            UserError: the last attempt to write a checkpoint failed.
        """
        for path, reason in self._failed.items():
            raise UserError(f"the last state of {path} could not be written ({reason}): make room, and resume")
