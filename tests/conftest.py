"""Switches on runtime checking of every annotated tensor shape before anything of the package is imported."""

import importlib.util
import json
import os
from functools import cache
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

# Several workers on few cores run best with a thread each, and so do the programs that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

from jaxtyping import install_import_hook

install_import_hook("pem_lightning", "beartype.beartype")

import pytest
import torch


@pytest.fixture(scope="session")
def reference() -> Path:
    """Frozen outputs of the authors' implementation and of official evaluators (see the README there)."""
    return Path(__file__).parent / "data" / "reference"


@pytest.fixture(scope="session")
def official_weights(reference: Path):
    """Draws the weights behind a reference case, once: (name, seed) -> the authors' state dict, not to be changed."""
    spec = importlib.util.spec_from_file_location("regenerate_weights", reference / "regenerate_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    @cache
    def draw(name: str, seed: int) -> dict[str, torch.Tensor]:
        manifest = json.loads((reference / "pem" / f"manifest_{name}.json").read_text())
        return {key: torch.from_numpy(value) for key, value in module.weights(manifest, seed).items()}

    return draw


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which a module's jobs run; they draw their images there."""
    before = Path.cwd()
    os.chdir(folder := tmp_path_factory.mktemp("work"))
    yield folder
    os.chdir(before)
