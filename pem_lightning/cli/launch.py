"""The command line: composes an experiment once and runs it, or sweeps. It imports little until a job runs."""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pem_lightning.checkpoints import SHIPPED, Checkpoint
from pem_lightning.cli.errors import compose, configs, explain, key_of, user_error_behind
from pem_lightning.cli.overrides import literal_paths, parse, quote, sound_checkpoint, take_over
from pem_lightning.cli.usage import job_usage
from pem_lightning.files import check_writable, write_file
from pem_lightning.inference.sources import find_sources
from pem_lightning.installation import CONF, PACKAGE
from pem_lightning.processes import Interrupted, StopJobs, print_any_character, stop_in_order, when_orphaned
from pem_lightning.types import UserError

log = logging.getLogger(__name__)

_PROCESS = "PEM_LIGHTNING_OVERRIDES"
"""Environment variable: the overrides that processes which Lightning adds for more devices run with."""


class JobError(Exception):
    """A job of a sweep failed; the message is one line."""


class SweepFolder(Callback):
    """A callback of Hydra's: makes a sweep's folder before its sweeper, which may keep a database there."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the folder."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)


def main(job: str, arguments: Sequence[str] | None = None) -> None:
    """Run a job with overrides, once or as a sweep.

    Args:
        job: train, evaluate, predict, export or app.
        arguments: overrides and Hydra's options; None for the program's own.

    A user's mistake ends in one line and exit code 2, a sweep with a failed job in exit code 1, a signal in 128 + it.
    """
    print_any_character()
    with stop_in_order():
        try:
            _main(job, sys.argv[1:] if arguments is None else list(arguments))
            sys.stdout.flush()
        except BrokenPipeError:  # of `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes once more at its end
            sys.exit(128 + 13)  # as of a program that SIGPIPE ends


def _main(job: str, arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    options, others = parser.parse_known_intermixed_args(arguments)
    if {"-h", "--help"} & set(others):
        print(job_usage(job))
        return
    if others:  # --hydra-help, --info, --config-dir, ...: Hydra's own, which it reads from the program's arguments
        program = sys.argv

        def task(cfg: DictConfig) -> None:
            sys.argv = program  # Lightning starts it again for more devices
            _run_once(cfg, job, None)

        sys.argv = [program[0], *arguments]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=job)(task)()
        return
    try:
        with configs():
            _start(job, options)
    except UserError as error:
        _fail(str(error))
    except JobError as error:
        _fail(str(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, job))
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _start(job: str, options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    sweep = options.multirun or any(key_of(o) == "sweep" or o == "hydra.mode=MULTIRUN" for o in overrides)
    if "LOCAL_RANK" in os.environ and _PROCESS in os.environ:
        overrides, sweep = json.loads(os.environ[_PROCESS]), False
        when_orphaned(lambda: None, grace=5.0)  # after that time the first process is not ending, it was killed
    else:
        overrides = literal_paths(overrides, sweep)
        if job == "app" and not any(key_of(o) == "checkpoint" for o in overrides):
            overrides.insert(0, f"checkpoint={next(iter(SHIPPED))}")
    if sweep and not options.cfg:
        _sweep(job, overrides)
        return
    overrides, checkpoint = take_over(job, overrides)
    app: Any = GlobalHydra.instance().hydra
    if options.cfg:
        app.show_cfg(job, overrides, options.cfg, options.package, options.resolve)
        return
    _check_checkpoint(job, checkpoint)
    cfg = compose(job, overrides)
    if job == "predict" and cfg.launcher.name == "local":  # before the network is loaded, which takes seconds
        find_sources(list(cfg.input) if OmegaConf.is_list(cfg.input) else cfg.input)
    if job == "train" and checkpoint is not None and is_finished(cfg, checkpoint):
        done = f"{checkpoint.path} is trained to step {checkpoint.step} of {cfg.trainer.max_steps} already"
        if "resume=auto" not in options.overrides:
            raise UserError(f"{done}: raise recipe.max_steps to train on")
        print(f"{done}: nothing to do")
        return
    run_in_folder(_run_once, cfg, job, checkpoint)


def is_finished(cfg: DictConfig, checkpoint: Checkpoint) -> bool:
    """Whether a training has nothing left to do."""
    return checkpoint.step >= cfg.trainer.max_steps > 0


def run_in_folder(
    task: Callable[..., Any],
    cfg: DictConfig,
    job: str,
    checkpoint: Checkpoint | None,
    configure_logging: bool = True,
) -> Any:
    """Call `task(cfg, job=, checkpoint=)` in a run's folder with .hydra/; returns what it returns.

    Raises:
        UserError: the folder cannot be written.
    """
    check_writable(Path(cfg.hydra.run.dir))
    result = run_job(
        partial(task, job=job, checkpoint=checkpoint),
        cfg,
        job_dir_key="hydra.run.dir",
        job_subdir_key=None,
        configure_logging=configure_logging,
        hydra_context=HydraContext(GlobalHydra.instance().config_loader(), cast(Any, Callback())),
    )
    return result.return_value  # raises what the job raised


def _check_checkpoint(job: str, checkpoint: Checkpoint | None) -> None:
    if job != "train" and checkpoint is None:
        shipped = ", ".join(SHIPPED)
        raise UserError(
            f"which checkpoint? say checkpoint=outputs/.../checkpoints/best.ckpt, or one that ships: {shipped}"
        )


def _run_once(cfg: DictConfig, job: str, checkpoint: Checkpoint | None) -> float:
    try:
        return attempt(cfg, job, checkpoint)
    except UserError as error:
        _fail(str(error))


def attempt(cfg: DictConfig, job: str, checkpoint: Checkpoint | None) -> float:
    """Run a job; a user's mistake, wherever it was noticed, is raised as a UserError."""
    try:
        with _environment(cfg):
            return _run(cfg, job, checkpoint)
    except Exception as error:
        message = user_error_behind(error)
        if message is None:
            raise
        raise UserError(message) from error


def _run(cfg: DictConfig, job: str, checkpoint: Checkpoint | None) -> float:
    for expected in (
        ".*LeafSpec.* is deprecated",  # a function of PyTorch's that Lightning calls
        "Using ModelCheckpoint with manual optimization",  # ours has the weights after its step, as it should
        "Experiment logs directory",  # of a resumed run is not empty; `tidy_up` has renamed the earlier log
        "Checkpoint directory",
        "Found .* in eval mode at the start of training",  # those that `recipe.freeze` stops
    ):
        warnings.filterwarnings("ignore", message=expected, module="lightning.*")
    return getattr(importlib.import_module("pem_lightning.cli.jobs"), job)(cfg, checkpoint)


@contextmanager
def _environment(cfg: DictConfig) -> Iterator[None]:
    """Tell processes that Lightning adds which job this is, and undo what a job does to the environment."""
    before = dict(os.environ)
    own = [] if cfg.get("resume") is None else [f"resume={quote(cfg.resume)}"]
    config = HydraConfig.get()
    place = [f"hydra.run.dir={quote(config.runtime.output_dir)}", "hydra.output_subdir=null", "hydra.job.name=process"]
    os.environ[_PROCESS] = json.dumps([*config.overrides.task, *own, *place])
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)


def _sweep(job: str, overrides: Sequence[str]) -> None:
    """Let Hydra's sweeper and launcher run all combinations; it composes every one before the first job starts."""
    given = {key_of(o) for o in overrides}
    if "resume" in given:
        raise UserError(
            "resume= is for single runs; a sweep goes on when it is started again in its old hydra.sweep.dir"
        )
    overrides, checkpoint = take_over(job, overrides)
    # Folders are named by what differs between the jobs.
    varied = {o.key_or_group: o.is_sweep_override() for o in parse(overrides, job)}
    if not varied.get("checkpoint"):  # else every job reads its own
        _check_checkpoint(job, checkpoint)
    fixed = [key for key, several in varied.items() if not several]
    added = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(map(repr, fixed))}]", "hydra.mode=MULTIRUN"]
    if "hydra/launcher=joblib" in overrides and "hydra.launcher.n_jobs" not in given:
        added.append(f"hydra.launcher.n_jobs={torch.cuda.device_count() or 2}")
    packages = [str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]  # where launchers' processes find ours
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, packages))
    app: Any = GlobalHydra.instance().hydra
    run, parts = partial(run_in_sweep, job=job), [*overrides, *added]
    if "hydra/launcher=joblib" not in overrides:
        app.multirun(job, run, parts)
        return
    with StopJobs() as signals:
        try:
            app.multirun(job, run, parts)
        finally:
            if signals.received is not None:
                raise Interrupted(signals.received)


_job_signals = StopJobs()
"""Of a process of joblib: once it was asked to stop, it starts no further job."""


def run_in_sweep(cfg: DictConfig, job: str) -> float:
    """Run one job of a sweep.

    A job that finished in its folder with the same settings is not run again; a training that was cut off goes on from
    its last checkpoint. In a process of joblib an interrupted job returns NaN: for an error, joblib would kill the
    others, which are saving.

    Returns:
        The job's metric.

    Raises:
        JobError: it failed. The other jobs still run.
    """
    if multiprocessing.parent_process() is None:
        return _run_in_sweep(cfg, job)
    if _job_signals.listen():
        when_orphaned(lambda: os.kill(os.getpid(), signal.SIGTERM), grace=60.0)
    if _job_signals.received is None:
        try:
            with stop_in_order():
                return _run_in_sweep(cfg, job)
        except Interrupted as stop:
            _job_signals.received = stop.signal
    return float("nan")


def _run_in_sweep(cfg: DictConfig, job: str) -> float:
    config: Any = HydraConfig.get()
    folder = Path(config.runtime.output_dir)
    checkpoint = None
    if job != "train":
        cfg, checkpoint = _with_own_checkpoint(job)
    _adapt(cfg, folder)
    marker = folder / "finished.json"
    settings = hashlib.sha256(OmegaConf.to_yaml(cfg, resolve=True).encode()).hexdigest()
    finished = json.loads(marker.read_text()) if marker.is_file() else {}
    if finished.get("settings") == settings:
        log.info("finished before, with the same settings: not run again")
        return finished["value"]
    value, problem = float("nan"), ""
    try:
        checkpoint = _cut_off(cfg, folder) if job == "train" else checkpoint
        with _environment(cfg):
            value = _run(cfg, job, checkpoint)
    except Exception as error:
        user_error = user_error_behind(error)
        problem = user_error or f"{type(error).__name__}: {error}"
        log.error("%s", problem, exc_info=user_error is None)
    finally:
        if (wandb := sys.modules.get("wandb")) and wandb.run is not None:
            wandb.finish()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    gc.collect()  # here, where no error keeps its frames alive any more
    if problem:
        again = f"hydra.sweep.dir={quote(config.sweep.dir)}"
        raise JobError(f"{folder.name} failed ({problem}), see its run.log; add {again} to run only what is missing")
    if os.environ.get("SLURM_PROCID", "0") == "0":
        write_file(marker, json.dumps({"settings": settings, "value": value}) + "\n")
    return value


def _with_own_checkpoint(job: str) -> tuple[DictConfig, Checkpoint | None]:
    """The experiment with what its checkpoint brings, which the sweep could not know if it varies the checkpoint."""
    overrides, checkpoint = take_over(job, list(HydraConfig.get().overrides.task))
    own = compose(job, overrides)
    with open_dict(own):
        del own["hydra"]
    return own, checkpoint


def _adapt(cfg: DictConfig, folder: Path) -> None:
    """Share GPUs between the jobs of joblib; name the jobs of a sweep in Weights & Biases."""
    config: Any = HydraConfig.get()
    if config.launcher._target_.endswith("JoblibLauncher") and "trainer" in cfg:
        if cfg.trainer.devices != 1:
            raise UserError(f"hydra/launcher=joblib runs a job on one device: trainer.devices={cfg.trainer.devices}")
        if cfg.trainer.accelerator != "cpu" and (gpus := torch.cuda.device_count()) > 1:
            cfg.trainer.devices = [config.job.num % gpus]
    if OmegaConf.select(cfg, "logger.wandb") is not None:
        names = {"group": "_".join(folder.parent.parts[-2:]), "name": folder.name}
        given = {key_of(o) for o in config.overrides.task}
        for key, name in names.items():
            if f"logger.wandb.{key}" not in given:
                OmegaConf.update(cfg, f"logger.wandb.{key}", name, force_add=True)


def _cut_off(cfg: DictConfig, folder: Path) -> Checkpoint | None:
    """The last checkpoint of a training that stopped in its folder with the same settings."""
    try:
        checkpoint = sound_checkpoint(folder / "checkpoints" / "last.ckpt")
    except UserError:
        return None
    same = {**checkpoint.config, "resume": None} == OmegaConf.to_container(cfg, resolve=True)
    if not (same and 0 < checkpoint.step < cfg.trainer.max_steps):
        return None
    cfg.resume = str(checkpoint.path)
    return checkpoint
