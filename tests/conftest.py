"""Switches on runtime checking of every annotated tensor shape before anything of the package is imported."""

import os
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from jaxtyping import install_import_hook

install_import_hook("pem_lightning", "beartype.beartype")

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def reference() -> Path:
    """Frozen outputs of the authors' implementation and of official evaluators (see the README there)."""
    return Path(__file__).parent / "data" / "reference"
