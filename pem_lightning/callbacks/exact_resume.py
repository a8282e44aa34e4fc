"""A resumed training repeats what the interrupted one would have done."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from pem_lightning.evaluation import from_plain, to_plain
from pem_lightning.module import PEMModule


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed every generator (Python's, NumPy's, PyTorch's of the CPU and of all GPUs) for one step of one process.

    What a step draws depends on these three numbers alone. So no generator's state has to be kept, and neither a
    validation, nor a picture, nor another number of loading processes changes the training.

    Args:
        seed: of the run.
        step: number of steps before this one.
        rank: number of the process.
    """
    words = np.random.SeedSequence((seed, step, rank)).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.manual_seed(int(words[2]))


class ExactResume(Callback):
    """Adds what Lightning does not do when it restores a training with an endless loader (see `EndlessSampler`).

    Lightning brings back weights, averages, optimiser, schedule, loss scale, the best scores, and the number of steps.
    It loses a validation that was due or under way, counts steps differently by the moment at which a checkpoint was
    made, and forgets the best scores of a folder that was moved.
    """

    def __init__(self) -> None:
        self._seed = 0
        self._world_size = 1
        self._validation_due = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the number of processes."""
        self._world_size = trainer.world_size

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

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is due before the next step, and what random numbers depend on."""
        return {"validation_due": self._validation_due, "world_size": self._world_size}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the last validation's numbers, which the end of the run reports; leave out a validation's progress."""
        state = checkpoint["callbacks"][self.state_key]
        state["evaluation"] = to_plain(cast(PEMModule, pl_module).evaluation)
        checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"] = _progress(0, 0, 0, 0)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put what Lightning is about to read into the one form that it restarts from correctly."""
        callbacks = checkpoint["callbacks"]
        state = callbacks.get(self.state_key, {})
        cast(PEMModule, pl_module).evaluation = from_plain(state.get("evaluation"))
        due = state.get("validation_due", False)
        if state.get("world_size", trainer.world_size) != trainer.world_size:
            rank_zero_warn(
                f"{state['world_size']} devices were used before, {trainer.world_size} are now: the same images in the "
                "same steps, but not the same random points, and sums are rounded otherwise"
            )
        if trainer.max_epochs == -1:
            _set_progress(checkpoint["loops"]["fit_loop"], due, trainer.val_check_interval)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.state_key in callbacks and callback.dirpath:
                callbacks[callback.state_key] = _moved(callbacks[callback.state_key], str(callback.dirpath))


def _set_progress(loops: dict[str, Any], validation_due: bool, validation_interval: int | float) -> None:
    """Say "in the middle of the only epoch, so many steps are complete", at whatever moment the checkpoint was made."""
    steps = loops["epoch_loop.batch_progress"]["total"]["processed"]
    validated = steps > 0 and isinstance(validation_interval, int) and steps % validation_interval == 0
    loops["epoch_progress"] = _progress(1, 0, 1, 0)
    loops["epoch_loop.batch_progress"] = _progress(steps, steps, steps, steps)
    # After a step with validation, Lightning passes by the end of that step once more and counts it there.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - validated
    # A validation that has begun is begun anew.
    loops["epoch_loop.val_loop.batch_progress"] = _progress(int(validation_due), 0, 0, 0)


def _progress(total_started: int, total_completed: int, started: int, completed: int) -> dict[str, Any]:
    """Lightning's counters, over all epochs and in this one."""

    def counters(started: int, completed: int) -> dict[str, int]:
        return {"ready": started, "started": started, "processed": completed, "completed": completed}

    return {
        "total": counters(total_started, total_completed),
        "current": counters(started, completed),
        "is_last_batch": False,
    }


def _moved(state: dict[str, Any], folder: str) -> dict[str, Any]:
    """What a `ModelCheckpoint` knows, with its files where they are now, if they are there."""
    old, best = state["dirpath"], state["best_model_path"]
    if old == folder or not (Path(folder) / Path(best).name).is_file():
        return state

    def move(path: str) -> str:
        return str(Path(folder) / Path(path).name) if path else path

    return {
        **state,
        "dirpath": folder,
        "best_model_path": move(best),
        "kth_best_model_path": move(state["kth_best_model_path"]),
        "last_model_path": move(state["last_model_path"]),
        "best_k_models": {move(path): score for path, score in state["best_k_models"].items()},
    }
