"""Before a sweep: which jobs it has, whether every one of them composes, and where they go."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from filelock import FileLock, Timeout
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from pem_lightning.cli.errors import CONF, check_composes, explain, is_override, key_of, user_error_behind
from pem_lightning.cli.overrides import sound_checkpoint
from pem_lightning.files import write_file
from pem_lightning.training.signals import Interrupted
from pem_lightning.types import UserError

_NO_RUN = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--shell-completion", "-sc", "--version"}
"""Options of Hydra's that run nothing."""


class Sweep(NamedTuple):
    """A sweep that may start.

    Attributes:
        directory: holds one folder per job.
        arguments: the command line for Hydra.
    """

    directory: Path
    arguments: list[str]


def plan_sweep(job: str, arguments: Sequence[str]) -> Sweep | None:
    """Check a sweep before its first job, so that a mistake costs a second and not hours.

    Every value of every swept key is composed once; Hydra composes their combinations before it starts.

    Args:
        job: name of the entry point's config.
        arguments: the command line.

    Returns:
        None if the command line asks for a single run.

    Raises:
        UserError: something does not compose.
    """
    if _NO_RUN & {a.split("=", 1)[0] for a in arguments}:
        return None
    options = [a for a in arguments if not is_override(a)]
    given = _values([a for a in arguments if is_override(a)], job)
    first = [value[0] for value in given.values()]
    cfg = check_composes(job, [*first, *options])
    if not {"-m", "--multirun"} & set(options) and cfg.hydra.mode != RunMode.MULTIRUN:
        return None
    if cfg.get("resume") is not None:
        raise UserError(
            "resume= is for single runs; a sweep goes on when it is started again in its old hydra.sweep.dir"
        )
    parameters = OmegaConf.to_container(cfg.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
    values = _values([f"{key}={value}" for key, value in parameters.items()], job) | given
    base = {key: value[0] for key, value in values.items()}
    for key, choices in values.items():
        for choice in choices[1:] if key in given else choices:
            check_composes(job, list((base | {key: choice}).values()))
    fixed = [key.lstrip("+~").split("@")[0] for key, choices in values.items() if len(choices) == 1]
    own = {key_of(a) for a in arguments if is_override(a)}
    directory = Path(cfg.hydra.sweep.dir)
    added = [f"hydra.sweep.dir='{directory}'"] if "hydra.sweep.dir" not in own else []
    excluded = "hydra.job.config.override_dirname.exclude_keys"
    if excluded not in own:  # what all jobs have in common is no part of their folders' names
        added.append(f"{excluded}=[{','.join(repr(key) for key in fixed)}]")
    if cfg.hydra.runtime.choices["hydra/launcher"] == "joblib" and "hydra.launcher.n_jobs" not in own:
        added += [
            f"hydra.launcher.n_jobs={parallel_jobs()}",
            "hydra.launcher.pre_dispatch=n_jobs",
            "hydra.launcher.batch_size=1",
        ]
    overrides = [a for a in arguments if is_override(a)]
    return Sweep(directory, [*options, *overrides, *added])  # an option between them is more than argparse understands


def _values(overrides: list[str], job: str) -> dict[str, list[str]]:
    """Every override's values by its key; of an interval, which Optuna samples, both ends."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            return {o.get_key_element(): _values_of(o) for o in parser.parse_overrides(overrides)}
        except HydraException as error:
            raise UserError(explain(error, job)) from error


def _values_of(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in (value.start, value.end)]
    return [f"{key}={element}" for element in override.sweep_string_iterator()]


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


def run_sweep(job: str, sweep: Sweep, run: Callable[[], object]) -> int:
    """Run all jobs and print one summary.

    Args:
        job: name of the entry point's config.
        sweep: as planned.
        run: Hydra's main.

    Returns:
        The exit code: 0 if all jobs finished, 1 if one failed, 2 if none could start, 130 if the user stopped them.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves it to us how an error is shown
    packages = [str(CONF.parent), os.environ.get("PYTHONPATH", "")]  # where other machines' processes find ours
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
    sweep.directory.mkdir(parents=True, exist_ok=True)
    go_on = f"add hydra.sweep.dir='{sweep.directory}' to go on"
    code = 0
    try:
        run()
    except KeyboardInterrupt:
        code = 130
        print(f"error: interrupted; {go_on}", file=sys.stderr)
    except HydraException as error:
        code = 2
        print(f"error: {explain(error, job)}", file=sys.stderr)
    except Exception as error:
        code = 1
        log_file = write_file(sweep.directory / "error.log", traceback.format_exc())
        print(f"error: the sweep stopped early ({describe(error)}), see {log_file}; {go_on}", file=sys.stderr)
    logging.shutdown()
    text, failed = summarize(sweep.directory)
    print(text, flush=True)
    return code or int(failed > 0)


def summarize(directory: Path) -> tuple[str, int]:
    """Tell what became of the jobs in a sweep's folder.

    Returns:
        One line per job, in their order, and the number of those that did not finish.
    """
    folders = sorted((path.parent for path in directory.glob(f"*/{RECORD}")), key=_number)
    records = [read_record(folder) for folder in folders]
    failed = sum(record.get("status") != "finished" for record in records)
    lines = [f"{len(records) - failed} of {len(records)} jobs finished in {directory}"]
    width = max((len(folder.name) for folder in folders), default=0)
    for folder, record in zip(folders, records, strict=True):
        lines.append(f"  {folder.name:{width}}  {_outcome(record)}")
    return "\n".join(lines), failed


def _number(folder: Path) -> tuple[int, str]:
    match = re.match(r"\d+", folder.name)
    return (int(match[0]) if match else sys.maxsize, folder.name)


def _outcome(record: dict) -> str:
    status = record.get("status")
    if status == "finished":
        value = record["value"]
        return f"{record['metric']} {float('nan') if value is None else value:.2f}"
    if status == "failed":
        return f"failed: {record['error']}"
    return "interrupted" if status == "interrupted" else "did not end (killed, or still running)"


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
