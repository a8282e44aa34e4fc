"""PEM (Prototype-based Efficient MaskFormer, CVPR 2024) for panoptic, semantic and instance segmentation."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# PyTorch's switch for huge pages in CPU tensors, read at its first allocation: on Linux a fifth of an image's time is
# otherwise spent in page faults. 0 in the environment switches it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.2.0"

if TYPE_CHECKING:
    from pem_lightning import checkpoints
    from pem_lightning.cli.notebook import train
    from pem_lightning.inference.predictor import Predictor
    from pem_lightning.models.pem import PEM, build_pem
    from pem_lightning.types import DatasetInfo, Predictions, Sample, Segment, Target

__all__ = [
    "PEM",
    "DatasetInfo",
    "Predictions",
    "Predictor",
    "Sample",
    "Segment",
    "Target",
    "build_pem",
    "checkpoints",
    "train",
]

_HOMES = {
    **dict.fromkeys(("PEM", "build_pem"), "pem_lightning.models.pem"),
    **dict.fromkeys(("DatasetInfo", "Predictions", "Sample", "Segment", "Target"), "pem_lightning.types"),
    "Predictor": "pem_lightning.inference.predictor",
    "train": "pem_lightning.cli.notebook",
}
_SUBMODULES = ("checkpoints", "files", "models", "types")


def __getattr__(name: str) -> Any:
    """All names are imported when they are asked for: `pem_lightning.deploy` works without PyTorch."""
    if name in _SUBMODULES:
        return import_module(f"pem_lightning.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
