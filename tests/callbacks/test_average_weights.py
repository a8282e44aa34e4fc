"""Averaged weights through a whole training: validated, saved, evaluated and predicted with, resumed."""

import json
import os
from pathlib import Path

import pytest
import torch

from pem_lightning.callbacks import AverageWeights
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.types import UserError
from tests.jobs import TINY, call

LIMITS = ("recipe.val_interval=2", "recipe.checkpoint_interval=2", "callbacks.panels=null", "callbacks.curves=null")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("averaged")
    before = Path.cwd()
    os.chdir(folder)
    settings = ("recipe.max_steps=4", "recipe.ema_decay=0.2", "recipe.optimizer.lr=0.02")  # far enough in a few steps
    assert call("train", *TINY, *LIMITS, *settings, "hydra.run.dir=trained") == 0
    yield folder / "trained"
    os.chdir(before)


def numbers(folder):
    content = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name.startswith("val/")}


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(UserError, match=r"recipe\.ema_decay"):
        AverageWeights(decay)


@pytest.mark.slow
def test_checkpoints_have_both_and_averaged_ones_are_validated(trained):
    checkpoint = read_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert checkpoint.raw.keys() == checkpoint.network.keys()
    names = [name for name, value in checkpoint.raw.items() if value.is_floating_point()]
    assert any(not torch.equal(checkpoint.raw[name], checkpoint.network[name]) for name in names)
    path = f"checkpoint={trained}/checkpoints/last.ckpt"
    assert call("evaluate", path, "hydra.run.dir=averaged") == 0
    assert numbers("averaged") == numbers(trained)
    assert "averaged weights" in Path("averaged/run.log").read_text()
    assert call("evaluate", path, "averaged_weights=false", "hydra.run.dir=raw") == 0
    assert numbers("raw") != numbers(trained)


@pytest.mark.slow
def test_a_resumed_training_goes_on_with_its_average(trained):
    """And one that had none begins with its weights."""
    resume = f"resume={trained}/checkpoints/last.ckpt"
    more = (*TINY, *LIMITS, "recipe.max_steps=6")
    assert call("train", *more, "recipe.ema_decay=0.2", resume, "hydra.run.dir=resumed") == 0
    content = torch.load("resumed/checkpoints/last.ckpt", weights_only=True)["pem_lightning"]
    assert content["averaged"]["updates"] == 6
    assert call("train", *TINY, *LIMITS, "recipe.max_steps=2", "hydra.run.dir=plain") == 0
    assert read_checkpoint("plain/checkpoints/last.ckpt").raw is None
    resume = "resume=plain/checkpoints/last.ckpt"
    assert call("train", *more, "recipe.ema_decay=0.2", resume, "hydra.run.dir=late") == 0
    assert torch.load("late/checkpoints/last.ckpt", weights_only=True)["pem_lightning"]["averaged"]["updates"] == 4
    assert "begins with its raw ones" in Path("late/run.log").read_text()
