"""Data sets, their targets and augmentation."""

from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataModule, CityscapesDataset
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.synthetic import SyntheticDataModule, generate_synthetic
from pem_lightning.data.targets import VOID_CLASS, build_target, class_map
from pem_lightning.data.transforms import EvalTransform, TrainTransform

__all__ = [
    "CITYSCAPES",
    "VOID_CLASS",
    "CityscapesDataModule",
    "CityscapesDataset",
    "EvalTransform",
    "SegmentationDataModule",
    "SyntheticDataModule",
    "TrainTransform",
    "build_target",
    "class_map",
    "generate_synthetic",
]
