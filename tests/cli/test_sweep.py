"""Sweeps as they run: a job's failure stays its own, its folder says how it ended, and one summary tells it all."""

import gc
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import read_write

from pem_lightning.cli import main as run
from pem_lightning.cli import sweeps as devices
from pem_lightning.cli.sweeps import summarize, take_gpu, worker_number
from pem_lightning.types import UserError
from tests.jobs import call


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Puts a function in the place of training; sweeps run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def replace(function):
        monkeypatch.setitem(run.JOBS, "train", function)

    return replace


def records(folder="sweep"):
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*/job.json"))}


def deep(levels):
    raise RuntimeError("a bug\nin two lines") if levels == 0 else deep(levels - 1)


def failing(cfg):
    if cfg.seed == 1:
        raise UserError("there is a cure")
    if cfg.seed == 2:
        deep(3)
    if cfg.seed == 3:
        sys.exit(7)
    if cfg.seed == 4:
        raise MemoryError
    if cfg.seed == 5:
        return float("nan")
    return 10.0 * cfg.seed


@pytest.mark.slow
def test_every_job_runs_and_one_summary_tells_how_they_ended(job, capsys):
    job(failing)
    assert call("train", "-m", "seed=0,1,2,3,4,5,6", "decoder_layers=2", "hydra.sweep.dir=sweep") == 1
    out, err = capsys.readouterr()
    summary = out[out.index("3 of 7 jobs") :].splitlines()
    assert summary == [
        "3 of 7 jobs finished in sweep",
        "  0_seed-0  val/PQ 0.00",
        "  1_seed-1  failed: there is a cure",
        "  2_seed-2  failed: RuntimeError: a bug",
        "  3_seed-3  failed: SystemExit: 7",
        "  4_seed-4  failed: MemoryError: no message",
        "  5_seed-5  val/PQ nan",
        "  6_seed-6  val/PQ 60.00",
    ]
    assert "Traceback" not in out + err
    logs = [Path(f"sweep/{k}_seed-{k}/run.log").read_text() for k in range(7)]
    assert [("Traceback" in text) for text in logs] == [False, False, True, True, True, False, False]
    assert "in deep" in logs[2]
    assert "there is a cure" in logs[1]
    assert all("there is a cure" not in text for k, text in enumerate(logs) if k != 1)
    assert records()["6_seed-6"]["overrides"] == ["seed=6", "decoder_layers=2"]


def test_a_sweep_without_failures_ends_well(job):
    job(failing)
    assert call("train", "-m", "seed=6", "hydra.sweep.dir=sweep") == 0


@pytest.mark.slow
def test_finished_jobs_are_not_run_again_unless_something_changed(job):
    seen = []

    def count(cfg):
        seen.append((cfg.seed, cfg.decoder_layers))
        if cfg.seed == 1 and len(seen) == 2:
            raise RuntimeError("the first time only")
        return 5.0

    job(count)
    arguments = ("-m", "seed=0,1", "hydra.sweep.dir=sweep")
    assert call("train", *arguments) == 1
    assert call("train", *arguments) == 0
    assert seen == [(0, 6), (1, 6), (1, 6)]
    assert call("train", *arguments, "decoder_layers=3") == 0
    assert seen[3:] == [(0, 3), (1, 3)]


def test_ctrl_c_stops_the_sweep_also_where_lightning_hides_it(job, capsys):
    def interrupted(cfg):
        if cfg.seed == 1:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                sys.exit(1)  # as Lightning does
        return 1.0

    job(interrupted)
    assert call("train", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep") == 130
    assert {name: r["status"] for name, r in records().items()} == {"0_seed-0": "finished", "1_seed-1": "interrupted"}
    out, err = capsys.readouterr()
    assert "error: interrupted; add hydra.sweep.dir='sweep' to go on" in err
    assert "1 of 2 jobs finished" in out


def test_a_combination_that_does_not_compose_ends_in_one_line(job, capsys):
    job(failing)
    arguments = ("-m", "task=semantic,panoptic", "dataset=synthetic,semantic_folder", "hydra.sweep.dir=sweep")
    assert call("train", *arguments) == 2
    _, err = capsys.readouterr()
    assert [line for line in err.splitlines() if line.startswith("error")] == [
        "error: dataset=semantic_folder has no task=panoptic: choose task=semantic"
    ]
    assert records() == {}


def test_jobs_leave_nothing_behind(job):
    """Settings of the process, and memory: what a job held is gone when the next one starts."""
    environment, arguments, threads = dict(os.environ), list(sys.argv), torch.get_num_threads()
    sizes = []

    def messy(cfg):
        sizes.append(sum(o.numel() for o in gc.get_objects() if type(o) is torch.Tensor))
        assert torch.get_default_dtype() == torch.float32
        assert "LEFT_BEHIND" not in os.environ
        assert not torch.are_deterministic_algorithms_enabled()
        os.environ["LEFT_BEHIND"] = "1"
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        cycle = [torch.zeros(1000, 1000)]
        cycle.append(cycle)
        raise RuntimeError(cycle)

    job(messy)
    assert call("train", "-m", "seed=0,1,2", "hydra.sweep.dir=sweep") == 1
    assert len(sizes) == 3
    assert max(sizes) < sizes[0] + 1_000_000
    changed = {k for k in os.environ.keys() | environment.keys() if os.environ.get(k) != environment.get(k)}
    assert changed <= {"HYDRA_FULL_ERROR", "PYTHONPATH"}
    assert (sys.argv, torch.get_num_threads()) == (arguments, threads)


def test_processes_that_a_job_adds_run_the_job_and_not_the_sweep(job):
    seen = []
    job(lambda cfg: seen.append((sys.argv[1:], HydraConfig.get().run.dir)) or 1.0)
    call("train", "sweep=paper_depth", "decoder_layers=1,2", "hydra.sweep.dir=sweep")
    for layers, (arguments, folder) in enumerate(seen, start=1):
        assert arguments[:2] == [f"decoder_layers={layers}", "sweep=paper_depth"]
        assert arguments[-1] == "hydra.mode=RUN"
        assert folder.endswith(f"sweep/{layers - 1}_decoder_layers-{layers}")


def test_a_killed_job_is_no_finished_one(tmp_path):
    (tmp_path / "10_x").mkdir()
    (tmp_path / "10_x" / "job.json").write_text('{"status": "running"}')
    (tmp_path / "9_y").mkdir()
    (tmp_path / "9_y" / "job.json").write_text('{"status": "finished", "metric": "val/AP", "value": null}')
    text, failed = summarize(tmp_path)
    assert failed == 1
    assert text.splitlines()[1:] == ["  9_y   val/AP nan", "  10_x  did not end (killed, or still running)"]


def test_workers_take_different_numbers_and_keep_them(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "_held", {})
    assert worker_number(tmp_path) == worker_number(tmp_path) == 0
    other = {}
    monkeypatch.setattr(devices, "_held", other)  # as another process would find it
    assert worker_number(tmp_path) == 1
    other.popitem()[1][1].release()
    assert worker_number(tmp_path) == 1


@pytest.mark.parametrize(("gpus", "accelerator", "devices_"), [(4, "auto", [0]), (4, "cpu", 1), (1, "gpu", 1)])
def test_a_job_of_joblib_gets_its_workers_gpu(job, monkeypatch, gpus, accelerator, devices_):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(devices, "_held", {})
    seen = []

    def look(cfg):
        with read_write(HydraConfig.get().launcher) as launcher:
            launcher._target_ = "JoblibLauncher"
        take_gpu(cfg)
        seen.append(cfg.trainer.devices)
        return 1.0

    job(look)
    arguments = ("-m", "hydra.sweep.dir=sweep", f"trainer.accelerator={accelerator}")
    assert call("train", *arguments) == 0
    assert seen == [devices_]
