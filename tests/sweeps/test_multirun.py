"""Real training in sweeps: one job after the other, several at a time, as on a cluster, and as Optuna wants them."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image

from pem_lightning.checkpoints import read_checkpoint
from tests.jobs import call

ROOT = Path(__file__).parents[2]
INSTALLED = importlib.util.find_spec("hydra_plugins") is not None
needs_plugins = pytest.mark.skipif(not INSTALLED, reason="needs Hydra's plugins: pip install -r requirements-sweep.txt")

pytestmark = pytest.mark.slow


def record(folder):
    return json.loads((folder / "job.json").read_text())


@pytest.fixture(scope="module")
def swept(work, tiny):
    """Folder of a sweep of three jobs, one of which cannot run; in one process."""
    arguments = ("sweep=paper_attention", "ablation=no_masking,[no_csm,no_deformable]", "recipe.global_batch_size=2,9")
    assert call("train", *tiny, *arguments, "hydra.sweep.dir=swept", "logger=csv") == 1
    return work / "swept"


def test_one_folder_per_job(swept):
    names = sorted(path.parent.name for path in swept.glob("*/job.json"))
    assert names == [
        "0_ablation-no_masking_recipe.global_batch_size-2",
        "1_ablation-no_masking_recipe.global_batch_size-9",
        "2_ablation-no_csm+no_deformable_recipe.global_batch_size-2",
        "3_ablation-no_csm+no_deformable_recipe.global_batch_size-9",
    ]
    for number, name in enumerate(names):
        finished = number in (0, 2)
        assert record(swept / name)["status"] == ("finished" if finished else "failed")
        assert (swept / name / "metrics.json").is_file() == finished
        assert (swept / name / "run.log").is_file()
    assert "make no batch of 9" in record(swept / names[1])["error"]
    metric = json.loads((swept / names[0] / "metrics.json").read_text())["val/PQ"]
    assert record(swept / names[0])["value"] == pytest.approx(metric)


def test_a_sweeps_checkpoint_is_evaluated_predicts_and_goes_on(swept, tiny, tmp_path):
    """What chose its job in the sweep goes with it, the sweep itself does not."""
    folder = swept / "2_ablation-no_csm+no_deformable_recipe.global_batch_size-2"
    checkpoint = folder / "checkpoints" / "last.ckpt"
    assert read_checkpoint(checkpoint).config["network"]["csm"] is False
    assert {"sweep=paper_attention", "ablation=[no_csm,no_deformable]"} <= set(read_checkpoint(checkpoint).overrides)
    assert call("evaluate", f"checkpoint='{checkpoint}'", f"hydra.run.dir={tmp_path}/evaluated") == 0
    again = json.loads((tmp_path / "evaluated" / "metrics.json").read_text())
    assert again["val/PQ"] == json.loads((folder / "metrics.json").read_text())["val/PQ"]
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "photo.png")
    arguments = (f"input={tmp_path}/photo.png", f"output={tmp_path}/out")
    assert call("predict", f"checkpoint='{checkpoint}'", *arguments) == 0
    ablation = "ablation=[no_csm,no_deformable]"
    assert call("train", *tiny, ablation, "recipe.max_steps=2", f"resume='{checkpoint}'") == 0
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2


def test_a_job_that_was_cut_off_goes_on_from_its_last_checkpoint(work, swept, tiny):
    """Even if it once started from weights."""
    weights = f"weights='{swept}/0_ablation-no_masking_recipe.global_batch_size-2/checkpoints/last.ckpt'"
    arguments = (*tiny, "-m", "hydra.sweep.dir=cut", "recipe.max_steps=2", weights)
    code = call("train", *arguments, "+callbacks.stop._target_=tests.sweeps.stop_once.StopOnce")
    assert code == 1
    assert "the first time" in record(work / "cut" / "0")["error"]
    assert call("train", *arguments, "+callbacks.stop._target_=tests.sweeps.stop_once.StopOnce") == 0
    log = (work / "cut" / "0" / "run.log").read_text()
    assert "at step 1" in log
    assert log.count("weights from") == 1
    assert json.loads((work / "cut" / "0" / "metrics.json").read_text())["step"] == 2


@needs_plugins
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers(work, tiny, launcher):
    """From a folder that is not the project's, in processes of their own; each reports, and one summary tells."""
    if launcher == "joblib":
        tiny = (*tiny, "hydra.launcher.n_jobs=2")
    arguments = (
        *tiny,
        "-m",
        f"hydra/launcher={launcher}",
        f"hydra.sweep.dir={launcher}",
        "recipe.global_batch_size=2,9",
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    summary = done.stdout[done.stdout.index("1 of 2 jobs finished") :].splitlines()
    assert summary[1].startswith("  0_recipe.global_batch_size-2  val/PQ ")
    assert summary[2].startswith("  1_recipe.global_batch_size-9  failed: ")
    assert "Traceback" not in done.stdout + done.stderr


@needs_plugins
def test_optuna_searches_and_goes_on(work, tiny, monkeypatch):
    from optuna import load_study

    monkeypatch.delenv("PYTHONWARNINGS", raising=False)
    options = [o for o in tiny if not o.startswith(("decoder_layers", "num_queries"))]
    space = ("num_queries=range(5,10)", "decoder_layers=1", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=optuna")
    for trials in (2, 4):
        assert call("train", *options, "sweep=optuna", *space) == 0
        study = load_study(study_name="train", storage="sqlite:///optuna/study.db")
        assert len(study.trials) == trials
    assert study.direction.name == "MAXIMIZE"
    assert {"num_queries", "recipe.optimizer.lr"} == set(study.trials[0].params)
    assert 1e-4 <= study.trials[0].params["recipe.optimizer.lr"] <= 3e-3


def await_text(file, text, seconds=60):
    """wandb's own process writes the file, and on a busy machine it does so later than `finish` returns."""
    end = time.monotonic() + seconds
    while text.encode() not in file.read_bytes():
        assert time.monotonic() < end, f"{text} is not in {file}"
        time.sleep(0.1)


def test_jobs_are_a_group_in_weights_and_biases(work, tiny, monkeypatch):
    """Offline: the run's own file names group, job and every setting."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert call("train", *tiny, "-m", "seed=0,1", "logger=wandb", "hydra.sweep.dir=tracked/now") == 0
    files = sorted(work.glob("tracked/now/*/wandb/offline-run-*/*.wandb"))
    assert [file.parents[2].name for file in files] == ["0_seed-0", "1_seed-1"]
    for number, file in enumerate(files):
        for text in ("tracked_now", f"{number}_seed-{number}", "recipe.optimizer.lr", "network.num_heads"):
            await_text(file, text)
    assert call("train", *tiny, "logger=wandb", "hydra.run.dir=alone") == 0
    wandb.finish()  # as the end of the process does
    (file,) = work.glob("alone/wandb/offline-run-*/*.wandb")
    await_text(file, "recipe.optimizer.lr")


def test_jobs_on_several_devices_follow_one_another(work, tiny):
    """Processes that Lightning adds belong to one job, and so does what connects them."""
    devices = ("trainer.devices=2", "trainer.strategy=ddp", "recipe.global_batch_size=4", "hydra.sweep.dir=devices")
    command = [sys.executable, str(ROOT / "train.py"), *tiny, "-m", "seed=0,1", *devices]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 jobs finished in devices" in done.stdout
