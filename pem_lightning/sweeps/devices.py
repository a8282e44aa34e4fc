"""Jobs that run at the same time on one machine share out its GPUs."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from pem_lightning.errors import UserError

_held: dict[Path, tuple[int, FileLock]] = {}
"""This process's number among the workers of a sweep, and the lock that keeps it, for as long as the process lives."""


def parallel_jobs() -> int:
    """How many jobs this machine runs at a time unless told otherwise: one per GPU; or two, which share the cores."""
    return torch.cuda.device_count() or 2


def take_gpu(cfg: DictConfig) -> None:
    """Give a job of the joblib launcher the GPU of its worker; other launchers decide themselves.

    Raises:
        UserError: the job wants several.
    """
    launcher = HydraConfig.get().launcher
    if not str(launcher._target_).endswith("JoblibLauncher"):
        return
    if cfg.trainer.devices != 1:
        raise UserError(f"hydra/launcher=joblib runs a job on one device: trainer.devices=1 (is {cfg.trainer.devices})")
    gpus = torch.cuda.device_count()
    if gpus > 1 and cfg.trainer.accelerator != "cpu":
        with open_dict(cfg):
            cfg.trainer.devices = [worker_number(Path(HydraConfig.get().sweep.dir)) % gpus]


def worker_number(sweep: Path) -> int:
    """The smallest number that no other living process of the sweep has; the same for all of a process's jobs."""
    key = sweep.resolve()
    if key not in _held:
        folder = key / ".workers"
        folder.mkdir(parents=True, exist_ok=True)
        for number in count():
            lock = FileLock(folder / str(number))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            _held[key] = number, lock
            break
    return _held[key][0]
