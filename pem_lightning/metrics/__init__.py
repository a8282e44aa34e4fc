"""Metrics with the official evaluators' exact rules."""

from pem_lightning.metrics.mean_iou import MeanIoU, MeanIoUResult
from pem_lightning.metrics.panoptic_quality import PanopticQuality, PanopticResult, QualityAverage

__all__ = ["MeanIoU", "MeanIoUResult", "PanopticQuality", "PanopticResult", "QualityAverage"]
