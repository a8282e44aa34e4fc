"""Results against annotations: which metrics a task has, and how they are reported."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn
from torchmetrics import Metric

from pem_lightning.metrics import (
    AveragePrecision,
    AveragePrecisionResult,
    MeanIoU,
    MeanIoUResult,
    PanopticQuality,
    PanopticResult,
    Precisions,
    QualityAverage,
    instance_f1,
)
from pem_lightning.types import DatasetInfo, Sample

_AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""COCO's names of `Precisions`, in its order."""


class Evaluation(NamedTuple):
    """The metrics of a whole data set, as fractions of 1; a task has some of them."""

    panoptic: PanopticResult | None = None
    semantic: MeanIoUResult | None = None
    instance: AveragePrecisionResult | None = None

    def scalars(self) -> dict[str, float]:
        """The headline numbers by the names that loggers use, in percent."""
        values: dict[str, float] = {}
        if self.panoptic is not None:
            for suffix, average in zip(("", "_things", "_stuff"), self.panoptic[:3], strict=True):
                values |= {f"val/PQ{suffix}": average.pq, f"val/SQ{suffix}": average.sq, f"val/RQ{suffix}": average.rq}
        if self.semantic is not None:
            values |= {"val/mIoU": self.semantic.miou, "val/pixel_accuracy": self.semantic.pixel_accuracy}
        if self.instance is not None:
            values |= {f"val/{name}": value for name, value in zip(_AP_NAMES, self.instance.all, strict=True)}
        return {name: 100 * value for name, value in values.items()}

    def per_class(self, info: DatasetInfo) -> list[dict[str, Any]]:
        """One row per class that the task has, in percent; NaN for classes that do not occur."""
        rows: list[dict[str, Any]] = []
        for k, c in enumerate(info.classes):
            row: dict[str, Any] = {"class": c.name, "kind": "thing" if c.is_thing else "stuff"}
            if self.panoptic is not None:
                qualities = {"PQ": "pq_per_class", "SQ": "sq_per_class", "RQ": "rq_per_class"}
                counts = {"TP": "true_positives", "FP": "false_positives", "FN": "false_negatives"}
                row |= {name: 100 * float(getattr(self.panoptic, key)[k]) for name, key in qualities.items()}
                row |= {name: int(getattr(self.panoptic, key)[k]) for name, key in counts.items()}
            if self.semantic is not None:
                row["IoU"] = 100 * float(self.semantic.iou_per_class[k])
            if self.instance is not None:
                if not c.is_thing:
                    continue
                row |= {name: 100 * value for name, value in zip(_AP_NAMES, self.instance.by_class[k], strict=True)}
                row["objects"] = int(self.instance.num_objects[k])
            rows.append(row)
        return rows

    def report(self, info: DatasetInfo, step: int) -> dict[str, Any]:
        """The content of metrics.json; null for what there is not."""
        return without_nan({"step": step, **self.scalars(), "per_class": self.per_class(info)})


def without_nan(value: Any) -> Any:
    """JSON has no NaN; null says the same."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


_RESULTS: dict[str, Any] = {
    result.__name__: result
    for result in (Evaluation, PanopticResult, QualityAverage, MeanIoUResult, AveragePrecisionResult, Precisions)
}


def to_plain(value: Any) -> Any:
    """An `Evaluation`, or any part of one, as a checkpoint can hold it."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {"": type(value).__name__, **{name: to_plain(part) for name, part in value._asdict().items()}}
    if isinstance(value, tuple):
        return [to_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.item() if isinstance(value, np.generic) else value


def from_plain(state: Any) -> Any:
    """Inverse of `to_plain`."""
    if isinstance(state, dict):
        return _RESULTS[state[""]](**{name: from_plain(part) for name, part in state.items() if name})
    if isinstance(state, list):
        return tuple(from_plain(part) for part in state)
    return state.numpy() if isinstance(state, torch.Tensor) else state


class Evaluator(nn.Module):
    """Accumulates the metrics of a task. A module, so that its states follow the model's device.

    Task "semantic" has the mean IoU, "panoptic" panoptic quality as well, "instance" COCO's average precision.
    """

    def __init__(self, info: DatasetInfo, task: str) -> None:
        super().__init__()
        # Named like the fields of `Evaluation`.
        self.panoptic = PanopticQuality(info.num_classes, info.thing_classes) if task == "panoptic" else None
        self.semantic = MeanIoU(info.num_classes) if task != "instance" else None
        self.instance = AveragePrecision(info.num_classes) if task == "instance" else None

    @property
    def needs_semantic(self) -> bool:
        """Whether the task's metrics look at `Result.semantic`."""
        return self.semantic is not None

    def update(self, result: Any, sample: Sample) -> float:
        """Add one image's `Result`, of the annotation's size.

        Returns:
            The image's own score in [0, 1]: its PQ, its mIoU, or `instance_f1`; NaN where there is nothing to score.
        """
        if self.instance is not None:
            self.instance.update(result.instances, sample.panoptic, sample.segments, sample.name)
            return instance_f1(result.instances, sample.panoptic, sample.segments)
        score = float("nan")
        if self.semantic is not None:
            score = self.semantic(result.semantic, sample.class_map()).miou
        if self.panoptic is not None:
            score = self.panoptic(result.panoptic, result.segments, sample.panoptic, sample.segments).all.pq
        return score

    def compute(self) -> Evaluation:
        """The metrics over all images of all processes since the last `reset`."""
        return Evaluation(**{name: cast(Metric, metric).compute() for name, metric in self.named_children()})

    def reset(self) -> None:
        """Forget all images."""
        for metric in self.children():
            cast(Metric, metric).reset()
