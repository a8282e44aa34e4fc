"""Metrics with the official evaluators' exact rules."""

from pem_lightning.metrics.average_precision import AveragePrecision, AveragePrecisionResult, Precisions, instance_f1
from pem_lightning.metrics.mean_iou import MeanIoU, MeanIoUResult
from pem_lightning.metrics.panoptic_quality import PanopticQuality, PanopticResult, QualityAverage

__all__ = [
    "AveragePrecision",
    "AveragePrecisionResult",
    "MeanIoU",
    "MeanIoUResult",
    "PanopticQuality",
    "PanopticResult",
    "Precisions",
    "QualityAverage",
    "instance_f1",
]
