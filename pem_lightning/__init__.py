"""PEM (Prototype-based Efficient MaskFormer, CVPR 2024) for panoptic, semantic and instance segmentation."""

from typing import TYPE_CHECKING, Any

from pem_lightning import checkpoints
from pem_lightning.networks.pem import PEM, build_pem
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
