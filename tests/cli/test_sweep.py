"""Sweeps: Hydra runs the jobs; a finished one is not run again, a failed one does not keep the others from running."""

import importlib.util
import json
import os
import time
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from lightning import Callback
from omegaconf import read_write

from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.cli import jobs, launch
from pem_lightning.types import UserError
from tests.jobs import TINIEST, call, in_child
from tests.training.killing import signal_group

HAS_PLUGINS = importlib.util.find_spec("hydra_plugins") is not None
needs_plugins = pytest.mark.skipif(not HAS_PLUGINS, reason="needs requirements-sweep.txt")

TINY = (
    *(option for option in TINIEST if not option.startswith("network.num_")),
    "dataset.datamodule.num_train=4",
    "decoder_layers=1",
    "num_queries=10",
    "recipe.max_steps=1",
    "recipe.val_interval=1",
    "recipe.checkpoint_interval=1",
)
"""Arguments of train.py for one step on drawn images."""


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Puts a function in the place of training; sweeps run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    return lambda function: monkeypatch.setattr(jobs, "train", lambda cfg, checkpoint: function(cfg))


def failing(cfg):
    if cfg.seed == 1:
        raise UserError("there is a cure")
    if cfg.seed == 2:
        raise RuntimeError("a bug")
    return 10.0 * cfg.seed


def test_every_job_runs_and_the_first_that_failed_is_told(job, capsys):
    job(failing)
    assert call("train", "-m", "seed=0,1,2,3", "decoder_layers=2", "hydra.sweep.dir=sweep") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 1_seed-1 failed (there is a cure), see its run.log; add hydra.sweep.dir='sweep' to")
    assert sorted(path.parent.name for path in Path("sweep").glob("*/finished.json")) == ["0_seed-0", "3_seed-3"]
    logs = [Path(f"sweep/{k}_seed-{k}/run.log").read_text() for k in range(4)]
    assert ["Traceback" in text for text in logs] == [False, False, True, False]
    assert "there is a cure" in logs[1]


def test_finished_jobs_are_not_run_again_unless_something_changed(job):
    seen = []

    def count(cfg):
        seen.append((cfg.seed, cfg.decoder_layers))
        if cfg.seed == 1 and len(seen) == 2:
            raise RuntimeError("the first time only")
        return float("nan")

    job(count)
    arguments = ("-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert call("train", *arguments) == 1
    assert call("train", *arguments) == 0
    assert seen == [(0, 6), (1, 6), (1, 6)]
    assert call("train", *arguments, "decoder_layers=3") == 0
    assert seen[3:] == [(0, 3), (1, 3)]


def test_jobs_leave_nothing_behind_and_tell_added_processes_what_to_run(job):
    environment, seen = dict(os.environ), []

    def messy(cfg):
        assert "LEFT_BEHIND" not in os.environ
        os.environ["LEFT_BEHIND"] = "1"
        seen.append(json.loads(os.environ["PEM_LIGHTNING_OVERRIDES"]))
        names = (cfg.logger.wandb.group, cfg.logger.wandb.name)
        assert names == (f"{Path.cwd().name}_sweep", Path(HydraConfig.get().runtime.output_dir).name)
        return 1.0

    job(messy)
    assert call("train", "sweep=paper_depth", "decoder_layers=1,2", "logger=wandb", "hydra.sweep.dir=sweep") == 0
    for layers, overrides in enumerate(seen, start=1):
        folder = Path(f"sweep/{layers - 1}_decoder_layers-{layers}").resolve()
        assert overrides[:3] == [f"decoder_layers={layers}", "sweep=paper_depth", "logger=wandb"]
        assert f"hydra.run.dir='{folder}'" in overrides
    changed = {k for k in os.environ.keys() | environment.keys() if os.environ.get(k) != environment.get(k)}
    assert changed <= {"PYTHONPATH"}


def test_a_process_that_lightning_adds_runs_its_job_and_not_the_sweep(job, monkeypatch):
    seen = []
    job(lambda cfg: seen.append((cfg.seed, HydraConfig.get().runtime.output_dir)) or 1.0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("PEM_LIGHTNING_OVERRIDES", json.dumps(["seed=1", "sweep=paper_depth", "hydra.run.dir=here"]))
    assert call("train", "-m", "seed=0,1", 'hydra.run.dir="elsewhere"') == 0
    assert seen == [(1, str(Path("here").resolve()))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m", "backbone=stdc1,stcd2"], "there is no backbone=stcd2 (did you mean stdc2?)"),
        (["sweep=paper_attention", "recipe.max_step=1,2"], "there is no key recipe.max_step "),
        (["sweep=paper_attention", "ablation=no_csm,nothing"], "there is no ablation=nothing"),
        (["sweep=paper_atention"], "there is no sweep=paper_atention (did you mean paper_attention?)"),
        (["-m", "seed=choice(1"], "cannot read 'seed=choice(1'"),
        (["-m", "seed=0,1", "resume=last"], "resume= is for single runs"),
    ],
)
def test_a_mistake_anywhere_is_found_before_the_first_job(job, arguments, message, capsys):
    job(lambda cfg: pytest.fail("a job ran"))
    assert call("train", *arguments, "hydra.sweep.dir=sweep") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_ctrl_c_stops_the_sweep(job, capsys):
    def interrupted(cfg):
        raise KeyboardInterrupt

    job(interrupted)
    assert call("train", "-m", "seed=0,1", "hydra.sweep.dir=sweep") == 130
    assert "error: interrupted" in capsys.readouterr().err


@needs_plugins
@pytest.mark.parametrize(("gpus", "accelerator", "devices"), [(4, "auto", [0]), (4, "cpu", 1), (1, "gpu", 1)])
def test_a_job_of_joblib_gets_a_gpu_of_its_own(job, monkeypatch, gpus, accelerator, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    seen = []
    run_in_sweep = launch.run_in_sweep

    def as_of_joblib(cfg, job):
        with read_write(HydraConfig.get().launcher) as launcher:
            launcher._target_ = "JoblibLauncher"
        return run_in_sweep(cfg, job)

    monkeypatch.setattr(launch, "run_in_sweep", as_of_joblib)
    job(lambda cfg: seen.append(cfg.trainer.devices) or 1.0)
    assert call("train", "-m", "hydra.sweep.dir=sweep", f"trainer.accelerator={accelerator}") == 0
    assert seen == [devices]


class StopOnce(Callback):
    """Fails after the second step of a run that was not resumed; the first is saved by then."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.ckpt_path is None:
            raise RuntimeError("the first time")


@pytest.fixture(scope="module")
def swept(work):
    """Folder of a sweep of two jobs, one of which cannot run; in one process."""
    arguments = ("sweep=paper_attention", "ablation=[no_csm,no_deformable]", "recipe.global_batch_size=2,9")
    assert call("train", *TINY, *arguments, "hydra.sweep.dir=swept") == 1
    return work / "swept"


@pytest.mark.slow
def test_a_job_of_a_sweep_is_evaluated_and_goes_on(swept, tmp_path):
    """What chose the job in the sweep goes with its checkpoint, the sweep itself does not."""
    names = ["0_recipe.global_batch_size-2", "1_recipe.global_batch_size-9"]
    assert sorted(path.name for path in swept.iterdir() if path.is_dir()) == names
    assert "make no batch of 9" in (swept / names[1] / "run.log").read_text()
    folder = swept / names[0]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert json.loads((folder / "finished.json").read_text())["value"] == pytest.approx(metrics["val/PQ"])
    path = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    assert checkpoint.config["network"]["csm"] is False
    assert {"sweep=paper_attention", "ablation=[no_csm,no_deformable]"} <= set(checkpoint.overrides)
    assert call("evaluate", f"checkpoint={path}", "trainer=cpu", f"hydra.run.dir={tmp_path}/evaluated") == 0
    assert json.loads((tmp_path / "evaluated" / "metrics.json").read_text())["val/PQ"] == metrics["val/PQ"]
    assert call("train", "recipe.max_steps=2", "trainer=cpu", f"resume={path}") == 0
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2


@pytest.mark.slow
def test_a_job_that_was_cut_off_goes_on_from_its_last_checkpoint(work):
    arguments = (*TINY, "-m", "hydra.sweep.dir=cut", "recipe.max_steps=2", "recipe.val_interval=2")
    stop = "+callbacks.stop._target_=tests.cli.test_sweep.StopOnce"
    assert call("train", *arguments, stop) == 1
    assert call("train", *arguments, stop) == 0
    log = (work / "cut" / "0" / "run.log").read_text()
    assert "at step 1" in log
    assert json.loads((work / "cut" / "0" / "metrics.json").read_text())["step"] == 2


@needs_plugins
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers(work, launcher, monkeypatch, capfd):
    """From a folder that is not the project's."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    one = ["hydra.launcher.n_jobs=1"] if launcher == "joblib" else []
    options = (f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}", "recipe.global_batch_size=2,9")
    assert in_child(*TINY, "-m", *one, *options) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: 1_recipe.global_batch_size-9 failed (")
    finished = work / launcher / "0_recipe.global_batch_size-2" / "finished.json"
    assert json.loads(finished.read_text())["value"] >= 0


class SignalAll(Callback):
    """When two jobs of a sweep have made two steps each, the first signals all processes."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            folder = Path(trainer.default_root_dir)
            (folder / "ready").touch()
            while len(list(folder.parent.glob("*/ready"))) < 2:
                time.sleep(0.05)
            if folder.name.startswith("0_"):
                signal_group("SIGTERM")


@needs_plugins
@pytest.mark.slow
def test_a_signal_to_all_processes_lets_the_jobs_of_joblib_save(work, capfd):
    signals = "+callbacks.signals._target_=tests.cli.test_sweep.SignalAll"
    arguments = (*TINIEST, "dataset.num_workers=1", "recipe.max_steps=1000", "hydra/launcher=joblib")
    assert in_child(*arguments, "-m", "seed=1,2,3", signals, "hydra.sweep.dir=signals") == 143
    assert "Traceback" not in capfd.readouterr().err
    folders = sorted((work / "signals").glob("*/checkpoints"))
    assert [folder.parent.name for folder in folders] == ["0_seed-1", "1_seed-2"]
    assert all(read_checkpoint(folder / "last.ckpt").step >= 2 for folder in folders)


@needs_plugins
@pytest.mark.slow
def test_optuna_searches_and_goes_on(work, monkeypatch):
    from optuna import load_study

    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    options = [o for o in TINY if not o.startswith(("decoder_layers", "num_queries"))]
    space = ("num_queries=range(5,10)", "decoder_layers=1", "hydra.sweeper.n_trials=1", "hydra.sweep.dir=optuna")
    for trials in (1, 2):
        assert call("train", *options, "sweep=optuna", *space) == 0
        study = load_study(study_name="train", storage="sqlite:///optuna/study.db")
        assert len(study.trials) == trials
    assert study.direction.name == "MAXIMIZE"
    assert {"num_queries", "recipe.optimizer.lr"} == set(study.trials[0].params)
    assert 1e-4 <= study.trials[0].params["recipe.optimizer.lr"] <= 3e-3


@pytest.mark.slow
def test_a_job_on_two_devices(work):
    devices = ("trainer.devices=2", "trainer.strategy=ddp", "recipe.global_batch_size=4")
    assert in_child(*TINY, "-m", *devices, "seed=0,1", "hydra.sweep.dir=two") == 0
    assert len(list((work / "two").glob("*/finished.json"))) == 2
