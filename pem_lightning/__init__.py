"""PEM (Prototype-based Efficient MaskFormer, CVPR 2024) for panoptic, semantic and instance segmentation."""

import os
from typing import TYPE_CHECKING, Any

# PyTorch's switch for huge pages in CPU tensors, read at its first allocation: on Linux a fifth of an image's time is
# otherwise spent in page faults. 0 in the environment switches it off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from pem_lightning import checkpoints
from pem_lightning.models.pem import PEM, build_pem
from pem_lightning.types import DatasetInfo, Predictions, Sample, Segment, Target

if TYPE_CHECKING:
    from pem_lightning.inference.predictor import Predictor

__all__ = ["PEM", "DatasetInfo", "Predictions", "Predictor", "Sample", "Segment", "Target", "build_pem", "checkpoints"]


def __getattr__(name: str) -> Any:
    """Predictor brings image libraries along, and is imported when it is asked for."""
    if name != "Predictor":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pem_lightning.inference.predictor import Predictor

    return Predictor
