"""What the tests of sweeps share: a folder to work in, and an experiment of seconds."""

import os
from pathlib import Path

import pytest

from tests.jobs import DRAWN

TINY = (
    *DRAWN,
    "dataset.datamodule.num_train=4",
    "dataset.datamodule.num_val=2",
    "decoder_layers=1",
    "num_queries=10",
    "recipe.max_steps=1",
    "recipe.val_interval=1",
    "recipe.checkpoint_interval=1",
    "callbacks.panels=null",
    "callbacks.curves=null",
)


@pytest.fixture(scope="session")
def tiny():
    """Overrides for a training run of one step on drawn images."""
    return TINY


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with drawn images; jobs run inside it."""
    folder = tmp_path_factory.mktemp("sweeps")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
