"""The embedded data set: drawn street scenes, written and read in Cityscapes' layout.

`dataset=synthetic` runs anywhere within seconds, through the code that real Cityscapes needs.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.progress import track

from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataModule
from pem_lightning.data.dataset import SampleTransform
from pem_lightning.data.street_scene import draw_street
from pem_lightning.data.transforms import EvalTransform, TrainTransform
from pem_lightning.files import is_system_file
from pem_lightning.types import UserError

GENERATOR_VERSION = 2
"""Raised whenever the pictures change, so that old folders are drawn anew."""

_CITY = "synthetic"
_MANIFEST = "synthetic_manifest.json"


def generate_synthetic(
    root: str | Path, *, train: int = 256, val: int = 64, height: int = 128, width: int = 256, seed: int = 0
) -> Path:
    """Write the data set unless it is there already with these parameters; returns `root`.

    It is drawn in a sibling folder and renamed when complete: a broken run leaves nothing that looks finished, and
    processes that start at once do not disturb one another. The same seed gives the same bytes.

    Raises:
        UserError: a number is out of range, or the folder holds files of something else.
    """
    root = Path(root)
    if min(train, val) < 1 or min(height, width) < 32 or seed < 0:
        raise UserError("dataset=synthetic needs at least one image per split, 32 pixels per edge and a seed from 0 on")
    manifest: dict[str, Any] = {
        "generator_version": GENERATOR_VERSION,
        "images": {"train": train, "val": val},
        "height": height,
        "width": width,
        "seed": seed,
        "done": True,
    }
    if _is_complete(root, manifest):
        return root
    if not _is_replaceable(root):
        raise UserError(f"{root} holds files that dataset=synthetic did not write: choose another dataset.root")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}.") as scratch:
        new = Path(scratch) / "new"
        jobs = [(split, index) for split, count in manifest["images"].items() for index in range(count)]
        for split, index in track(jobs, f"Drawing {len(jobs)} street scenes", transient=True):
            _write_sample(new, split, index, height, width, seed)
        (new / _MANIFEST).write_text(json.dumps(manifest, indent=2))
        try:
            if not _is_complete(root, manifest):  # another process may have been faster
                if root.exists():
                    root.rename(Path(scratch) / "old")
                new.rename(root)
        except OSError:
            if not _is_complete(root, manifest):
                raise
    return root


def _write_sample(root: Path, split: str, index: int, height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng([seed, ("train", "val").index(split), index])
    image, ids = draw_street(rng, height, width)
    name = f"{_CITY}_{index:06d}_000000"
    for array, folder, kind in ((image, "leftImg8bit", "leftImg8bit"), (ids, "gtFine", "gtFine_instanceIds")):
        path = root / folder / split / _CITY / f"{name}_{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path, compress_level=1)  # four times as fast, barely larger


def _is_complete(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether the folder was finished with these parameters and still has all its files."""
    try:
        written = json.loads((root / _MANIFEST).read_text())
    except (OSError, ValueError):
        return False
    return written == manifest and all(
        len(list((root / folder / split / _CITY).glob("*.png"))) == count
        for split, count in manifest["images"].items()
        for folder in ("leftImg8bit", "gtFine")
    )


def _is_replaceable(root: Path) -> bool:
    """Whether the folder holds nothing that the generator did not write; real data must never be replaced."""
    return (root.is_dir() or not root.exists()) and all(
        path.is_dir() or path.name.startswith(f"{_CITY}_") or is_system_file(path) for path in root.rglob("*")
    )


class SyntheticDataModule(CityscapesDataModule):
    """Drawn street scenes with Cityscapes' classes; written on first use. `seed` is that of the drawing."""

    info = replace(CITYSCAPES, name="synthetic")

    def __init__(
        self,
        *arguments: Any,
        num_train: int = 256,
        num_val: int = 64,
        height: int = 128,
        width: int = 256,
        seed: int = 0,
        **loading: Any,
    ) -> None:
        self.drawing = {"train": num_train, "val": num_val, "height": height, "width": width, "seed": seed}
        super().__init__(*arguments, **loading)

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """The paper's, scaled to the images' size and with milder resizing."""
        height, width = self.drawing["height"], self.drawing["width"]
        edges = [round(min(height, width) * eighths / 8) for eighths in range(6, 11)]
        return TrainTransform((height, width), edges, None), EvalTransform()

    def prepare_data(self) -> None:
        """Draw the images unless they are there."""
        generate_synthetic(self.root, **self.drawing)
