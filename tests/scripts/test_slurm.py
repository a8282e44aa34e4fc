"""The batch script, with an `srun` that only says what it was asked to run."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pem_lightning.cli.build import build_trainer
from pem_lightning.training.distributed import split_batch
from tests.jobs import compose

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


@pytest.fixture
def command(tmp_path):
    """What the script runs in job 7, on two nodes of four GPUs each."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "7"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": "python3"}
    arguments = ("dataset=cityscapes", "recipe.global_batch_size=64")
    done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_it_runs_a_training_that_all_nodes_share(command):
    assert command[:2] == ["python3", "train.py"]
    cfg = compose("train", *command[2:], "trainer.accelerator=cpu", "logger=none")
    assert (cfg.dataset.name, cfg.trainer.num_nodes, cfg.trainer.devices) == ("cityscapes", 2, 4)
    assert cfg.resume == "auto"
    assert "hydra.run.dir=outputs/slurm/7" in command
    world_size = build_trainer(cfg).world_size
    assert world_size == 8
    assert split_batch(cfg.recipe.global_batch_size, world_size, 4) == (8, 2)


def test_it_asks_for_what_it_uses():
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=SIGUSR1@90", "--requeue", "--open-mode=append"} <= set(options)
    assert [o for o in options if "per-node" in o] == ["--ntasks-per-node=4", "--gpus-per-node=4"]
    assert subprocess.run(["bash", "-n", SCRIPT], check=False).returncode == 0
