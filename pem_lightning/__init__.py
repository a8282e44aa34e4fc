"""PEM (Prototype-based Efficient MaskFormer, CVPR 2024) for panoptic, semantic and instance segmentation."""

from pem_lightning import checkpoints
from pem_lightning.networks.pem import PEM, build_pem
from pem_lightning.types import DatasetInfo, Predictions, Sample, Segment, Target

__all__ = ["PEM", "DatasetInfo", "Predictions", "Sample", "Segment", "Target", "build_pem", "checkpoints"]
