"""Data sets, their targets and augmentation."""

from pem_lightning.data.ade20k import ADE20K, ADE20K_PANOPTIC, ADE20KDataModule, ADE20KDataset
from pem_lightning.data.cache import CachedDataset
from pem_lightning.data.camvid import CAMVID, CamVidDataModule, CamVidDataset
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataModule, CityscapesDataset
from pem_lightning.data.coco import CocoPanopticDataModule, CocoPanopticDataset
from pem_lightning.data.coco_instances import CocoInstancesDataModule, CocoInstancesDataset
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.semantic_folder import SemanticFolderDataModule, SemanticFolderDataset
from pem_lightning.data.synthetic import SyntheticDataModule, generate_synthetic
from pem_lightning.data.targets import build_target
from pem_lightning.data.transforms import EvalTransform, SSDColorJitter, TrainTransform
from pem_lightning.types import IGNORE_INDEX

__all__ = [
    "ADE20K",
    "ADE20K_PANOPTIC",
    "CAMVID",
    "CITYSCAPES",
    "IGNORE_INDEX",
    "ADE20KDataModule",
    "ADE20KDataset",
    "CachedDataset",
    "CamVidDataModule",
    "CamVidDataset",
    "CityscapesDataModule",
    "CityscapesDataset",
    "CocoInstancesDataModule",
    "CocoInstancesDataset",
    "CocoPanopticDataModule",
    "CocoPanopticDataset",
    "EvalTransform",
    "SSDColorJitter",
    "SegmentationDataModule",
    "SemanticFolderDataModule",
    "SemanticFolderDataset",
    "SyntheticDataModule",
    "TrainTransform",
    "build_target",
    "generate_synthetic",
]
