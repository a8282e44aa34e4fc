"""Tiny data sets in the layout of the official archives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.damage import save


@pytest.fixture
def write_sample(tmp_path: Path) -> Callable[..., None]:
    """Writes one image and its instanceIds map below `tmp_path`."""

    def write(name: str, ids: np.ndarray, split: str = "train", image: np.ndarray | None = None) -> None:
        city = name.split("_")[0]
        if image is None:
            image = np.random.default_rng(len(name)).integers(0, 256, (*ids.shape, 3), np.uint8)
        for array, folder, kind in ((image, "leftImg8bit", "leftImg8bit"), (ids, "gtFine", "gtFine_instanceIds")):
            save(tmp_path / folder / split / city / f"{name}_{kind}.png", array)

    return write
