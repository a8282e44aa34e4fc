"""Training in one call, for notebooks and programs: `pem_lightning.train`. It does what train.py does.

What is the caller's stays as it was: the working directory, logging, signals, warnings, random states, environment, and
the caller's own Hydra app.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from pem_lightning.checkpoints import Checkpoint
from pem_lightning.cli.errors import compose, own_configs
from pem_lightning.cli.launch import attempt, is_finished, run_in_folder
from pem_lightning.cli.overrides import literal_paths, quote, take_over
from pem_lightning.inference.predictor import Predictor
from pem_lightning.installation import job_command
from pem_lightning.processes import Interrupted
from pem_lightning.types import UserError, did_you_mean

SHORT = {
    "root": "dataset.root",
    "steps": "recipe.max_steps",
    "batch_size": "recipe.global_batch_size",
    "lr": "recipe.optimizer.lr",
    "output": "hydra.run.dir",
}
"""Arguments that have other names as keys."""
_PATHS = ("root", "output", "weights", "resume")


@dataclass(frozen=True)
class TrainingRun:
    """A finished training.

    Attributes:
        folder: the run's, as train.py lays it out.
        score: the best value of the task's metric, in percent; NaN without a validation.
    """

    folder: Path
    score: float

    @property
    def checkpoint(self) -> Path:
        """The best one, or else the last.

        Raises:
            UserError: the training kept none.
        """
        for name in ("best.ckpt", "last.ckpt"):
            if (path := self.folder / "checkpoints" / name).is_file():
                return path
        raise UserError(f"{self.folder} has no checkpoint: debug=fast and callbacks that were left out keep none")

    @cached_property
    def predictor(self) -> Predictor:
        """A predictor with the checkpoint, on a GPU if there is one."""
        return Predictor(self.checkpoint)

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of metrics.json: the last validation's numbers; empty if there was none."""
        path = self.folder / "metrics.json"
        return json.loads(path.read_bytes()) if path.is_file() else {}


def train(
    *,
    dataset: str | None = None,
    root: str | Path | None = None,
    task: str | None = None,
    backbone: str | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    overrides: Sequence[str] = (),
    **more: Any,
) -> TrainingRun:
    """Train on this machine's GPU, or else its CPU, as `python train.py` does with the same choices.

    Ctrl-C, or a notebook's stop button, finishes the step, saves and raises KeyboardInterrupt; `resume=` goes on.

    Args:
        dataset, task, backbone, weights, resume: see train.py; None leaves the choice to the experiment.
        root: folder of the data set.
        steps: how long to train.
        batch_size: images of a step.
        lr: learning rate.
        output: folder of the run; by default a new one below outputs/.
        overrides: as on the command line, e.g. ["recipe.val_interval=100"]. They come last.
        more: any other choice or key of the experiment by its name, e.g. `num_queries=50`, `seed=1`, `logger="csv"`,
            `**{"recipe.val_interval": 100}`.

    Raises:
        UserError: an argument, the data or a checkpoint is not as it should be; the message names the cure.
        KeyboardInterrupt: after saving.
    """
    given = {"dataset": dataset, "root": root, "task": task, "backbone": backbone, "steps": steps, "lr": lr}
    given |= {"batch_size": batch_size, "weights": weights, "output": output, "resume": resume}
    with _callers_state(), own_configs():
        chosen = {key: value for key, value in given.items() if value is not None} | more
        _check_names(chosen)
        arguments = [f"{SHORT.get(key, key)}={_text(key, value)}" for key, value in chosen.items()]
        with _interrupts():
            return _train([*arguments, *literal_paths(list(overrides))])


def _train(arguments: Sequence[str]) -> TrainingRun:
    final, checkpoint = take_over("train", arguments)
    cfg = compose("train", final)
    if checkpoint is not None and is_finished(cfg, checkpoint):
        if "resume=auto" not in arguments:
            raise UserError(f"{checkpoint.path} is trained to its last step already: more steps= train on")
        return TrainingRun(checkpoint.path.parent.parent.absolute(), float("nan"))
    while not any(key.startswith(("hydra.run.dir=", "resume=")) for key in final) and Path(cfg.hydra.run.dir).exists():
        time.sleep(0.1)  # folders are named by the second
        cfg = compose("train", final)
    _check_devices(cfg)

    def task(cfg: DictConfig, job: str, checkpoint: Checkpoint | None) -> TrainingRun | Exception:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            with _log_into(HydraConfig.get()):
                return TrainingRun(folder, attempt(cfg, job, checkpoint))
        except Exception as error:  # Hydra would print something, too
            return error

    result = run_in_folder(task, cfg, "train", checkpoint, configure_logging=False)
    if isinstance(result, Exception):
        raise result
    return result


def _check_names(names: Mapping[str, Any]) -> None:
    """Names without a dot are short ones or the experiment's."""
    plain = [name for name in names if "." not in name and name not in SHORT]
    if not plain:
        return
    cfg = compose("train", [])
    known = {*SHORT, *map(str, cfg)} - {"hydra", "job", "output_dir"} | {
        "overrides",
        "sweep",
        "debug",
        "ablation",
        "scale",
    }
    for name in plain:
        if name not in known:
            raise UserError(
                f"train() has no argument {name}{did_you_mean(name, known)}; it takes choices and keys of the "
                f"experiment, which `{job_command('train')} --cfg job` prints, and overrides=[...]"
            )


def _text(name: str, value: Any) -> str:
    """A value in Hydra's grammar."""
    if name in _PATHS and value is not None:
        value = os.path.expanduser(value)
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return str(value) if re.fullmatch(r"[\w./+-]+", str(value)) else quote(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text('', one)}" for key, one in value.items()) + "}"
    if isinstance(value, Sequence) or OmegaConf.is_list(value):
        return "[" + ",".join(_text("", one) for one in value) + "]"
    raise UserError(f"train({name}=...) is a {type(value).__name__}: give text, a number, a list or a dict")


def _check_devices(cfg: DictConfig) -> None:
    devices = cfg.trainer.devices
    single = len(devices) == 1 if OmegaConf.is_list(devices) else str(devices) == "1"
    if not single or cfg.trainer.num_nodes != 1:
        raise UserError(
            f"train() trains on one device, not on trainer.devices={devices}: for several, start {job_command('train')}"
        )


@contextmanager
def _interrupts() -> Iterator[None]:
    """After the training has saved, hand the signal that stopped it to the caller's own handler."""
    main = threading.current_thread() is threading.main_thread()  # only there signals can be handled
    numbers = [n for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)] if main else []
    before = {number: signal.getsignal(number) for number in (getattr(signal, n) for n in numbers)}
    stopped: int | None = None
    try:
        yield
    except Interrupted as stop:
        stopped = stop.signal
    except SystemExit as stop:  # what Lightning makes of a Ctrl-C before the first step
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        stopped = signal.SIGINT
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
    if stopped is not None:
        if stopped in before:
            signal.raise_signal(stopped)
        raise KeyboardInterrupt


@contextmanager
def _log_into(config: Any) -> Iterator[None]:
    """Log into the run's file, and on the console where the caller has no logging."""
    root, package = logging.getLogger(), logging.getLogger("pem_lightning")
    file = Path(config.runtime.output_dir) / f"{config.job.name}.log"
    handlers: list[logging.Handler] = [logging.FileHandler(file, encoding="utf-8")]
    if not root.handlers:
        handlers.append(logging.StreamHandler(sys.stdout))
    levels = {package: min(package.getEffectiveLevel(), logging.INFO)}
    levels[logging.getLogger("lightning.pytorch.utilities.rank_zero")] = logging.WARNING  # as in conf/experiment.yaml
    before = {logger: logger.level for logger in levels}
    for handler in handlers:
        handler.setFormatter(logging.Formatter(config.job_logging.formatters.simple.format))
        root.addHandler(handler)
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


@contextmanager
def _callers_state() -> Iterator[None]:
    """Put back random states and warnings, and end a run of Weights & Biases that was begun inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    begun_before = (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None
    with warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
            if on_gpu:
                torch.cuda.set_rng_state_all(on_gpu)
            if not begun_before and (wandb := sys.modules.get("wandb")) is not None and wandb.run is not None:
                wandb.finish()
            gc.collect()  # a next training needs the memory
