"""One job of a sweep: its failure, its settings and its memory stay its own, and its folder says how it ended."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pem_lightning.config import key_of, user_error_behind
from pem_lightning.errors import UserError
from pem_lightning.files import write_file
from pem_lightning.interrupts import Interrupted
from pem_lightning.resume import sound_checkpoint
from pem_lightning.sweeps.devices import take_gpu

log = logging.getLogger(__name__)

RECORD = "job.json"
"""What a job's folder tells about it: status (running, finished, failed, interrupted), metric, value, error, ..."""


def run_job(job: Callable[[DictConfig], float], cfg: DictConfig) -> float:
    """Run one job of a sweep.

    A job that its folder calls finished, with these very settings, is not run again; one that was cut off goes on from
    its last checkpoint.

    Args:
        job: the work.
        cfg: the composed experiment.

    Returns:
        The job's metric; NaN if it failed, so that the sweep goes on.

    Raises:
        KeyboardInterrupt: the user stops the sweep.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    digest = hashlib.sha256(OmegaConf.to_yaml(cfg, resolve=True).encode()).hexdigest()
    record: dict[str, Any] = {"status": "running", "overrides": list(hydra.overrides.task), "digest": digest}
    _group(cfg, folder)
    earlier, start = read_record(folder), time.monotonic()
    if earlier.get("digest") == digest:
        if earlier["status"] == "finished":
            log.info("finished before, with the same settings: not run again")
            return float("nan") if earlier["value"] is None else earlier["value"]
        _go_on(cfg, folder)
    if earlier and cfg.get("resume") is None:  # curves are drawn from all logs in there
        shutil.rmtree(folder / "csv", ignore_errors=True)
    _write(folder, record)
    value = float("nan")
    try:
        with _kept_apart(cfg, folder):
            value = job(cfg)
        record |= {"status": "finished", "metric": cfg.task.monitor, "value": None if math.isnan(value) else value}
    except KeyboardInterrupt:
        record["status"] = "interrupted"
        raise
    except Interrupted as stop:
        record["status"] = "interrupted"
        if stop.signal == signal.SIGINT:
            raise KeyboardInterrupt from stop
        raise
    except (Exception, SystemExit) as error:
        # Lightning makes an exit of it and turns a deaf ear to the next one.
        if isinstance(error.__context__, KeyboardInterrupt):
            record["status"] = "interrupted"
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt from error
        record |= {"status": "failed", "error": describe(error)}
        log.error("%s", record["error"])
        if user_error_behind(error) is None:
            _write_traceback(error)
    finally:
        record["seconds"] = round(time.monotonic() - start, 1)
        _write(folder, record)
        gc.collect()  # here, where no error keeps its frames alive any more
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return value


def describe(error: BaseException) -> str:
    """An error in one line: the cure of a user's mistake, or a bug's type and message."""
    text = str(error).strip()
    return user_error_behind(error) or f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def read_record(folder: Path) -> dict[str, Any]:
    """What a job's folder tells about it; empty for one that never started."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


@rank_zero_only
def _write(folder: Path, record: dict[str, Any]) -> None:
    write_file(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _go_on(cfg: DictConfig, folder: Path) -> None:
    """Let a job that was cut off (a stopped sweep, a requeued job) go on, unless it was all but finished."""
    path = folder / "checkpoints" / "last.ckpt"
    try:
        checkpoint = sound_checkpoint(path)
    except UserError:
        return
    if 0 < checkpoint.step < cfg.trainer.max_steps:
        with open_dict(cfg):
            cfg.resume = str(checkpoint.path)


def _group(cfg: DictConfig, folder: Path) -> None:
    """In Weights & Biases the jobs of a sweep are a group, each by what is its own, unless the user names them."""
    if cfg.logger.get("wandb") is None:
        return
    own = {key_of(override) for override in HydraConfig.get().overrides.task}
    with open_dict(cfg):
        if "logger.wandb.group" not in own:
            cfg.logger.wandb.group = "_".join(folder.parent.parts[-2:])
        if "logger.wandb.name" not in own:
            cfg.logger.wandb.name = folder.name


def _write_traceback(error: BaseException) -> None:
    """Into the job's run.log only; the terminal has had its line."""
    about = (type(error), error, error.__traceback__)
    record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "what led to it:", (), about)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)


@contextmanager
def _kept_apart(cfg: DictConfig, folder: Path) -> Iterator[None]:
    """Undo what a job changes in its process."""
    environment, arguments = dict(os.environ), list(sys.argv)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    hydra: Any = HydraConfig.get()
    with read_write(hydra):  # processes that Lightning adds run this job, not the sweep, and in its folder
        hydra.run.dir = str(folder)
    own = [override for override in hydra.overrides.hydra if key_of(override) != "hydra.mode"]
    sys.argv[1:] = [*hydra.overrides.task, *own, "hydra.mode=RUN"]
    try:
        take_gpu(cfg)
        yield
    finally:
        sys.argv[:] = arguments
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.benchmark = benchmark
        if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
            wandb.finish()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
