"""Results against annotations: which metrics a task has, and how they are reported."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from pem_lightning.data.targets import VOID_CLASS, class_map
from pem_lightning.inference.task import Result
from pem_lightning.metrics import MeanIoU, MeanIoUResult, PanopticQuality, PanopticResult
from pem_lightning.types import DatasetInfo, Sample


class Evaluation(NamedTuple):
    """The metrics of a whole data set, as fractions of 1; `panoptic` only where the task has segments."""

    panoptic: PanopticResult | None
    semantic: MeanIoUResult

    def scalars(self) -> dict[str, float]:
        """The headline numbers by the names that loggers use, in percent."""
        values: dict[str, float] = {}
        if self.panoptic is not None:
            for suffix, average in (
                ("", self.panoptic.all),
                ("_things", self.panoptic.things),
                ("_stuff", self.panoptic.stuff),
            ):
                values |= {f"val/PQ{suffix}": average.pq, f"val/SQ{suffix}": average.sq, f"val/RQ{suffix}": average.rq}
        values |= {"val/mIoU": self.semantic.miou, "val/pixel_accuracy": self.semantic.pixel_accuracy}
        return {name: 100 * value for name, value in values.items()}

    def per_class(self, info: DatasetInfo) -> list[dict[str, Any]]:
        """One row per class, in percent; NaN for classes that do not occur."""
        rows: list[dict[str, Any]] = []
        for k, c in enumerate(info.classes):
            row: dict[str, Any] = {"class": c.name, "kind": "thing" if c.is_thing else "stuff"}
            if (panoptic := self.panoptic) is not None:
                row |= {
                    "PQ": 100 * float(panoptic.pq_per_class[k]),
                    "SQ": 100 * float(panoptic.sq_per_class[k]),
                    "RQ": 100 * float(panoptic.rq_per_class[k]),
                    "TP": int(panoptic.true_positives[k]),
                    "FP": int(panoptic.false_positives[k]),
                    "FN": int(panoptic.false_negatives[k]),
                }
            row["IoU"] = 100 * float(self.semantic.iou_per_class[k])
            rows.append(row)
        return rows


class Evaluator(nn.Module):
    """Accumulates the metrics of a task. A module, so that its states follow the model's device.

    Args:
        info: the classes.
        task: "panoptic" adds panoptic quality to the mean IoU that every task has.
    """

    def __init__(self, info: DatasetInfo, task: str) -> None:
        super().__init__()
        self.mean_iou = MeanIoU(info.num_classes, VOID_CLASS)
        self.panoptic_quality = PanopticQuality(info.num_classes, info.thing_classes) if task == "panoptic" else None

    def update(self, result: Result, sample: Sample) -> None:
        """Add one image; the result has the annotation's size and everything that the task's metrics look at."""
        assert result.semantic is not None
        self.mean_iou.update(result.semantic, class_map(sample))
        if self.panoptic_quality is not None:
            assert result.panoptic is not None
            self.panoptic_quality.update(result.panoptic, result.segments, sample.panoptic, sample.segments)

    def compute(self) -> Evaluation:
        """The metrics over all images of all processes since the last `reset`."""
        panoptic = self.panoptic_quality.compute() if self.panoptic_quality is not None else None
        return Evaluation(panoptic, self.mean_iou.compute())

    def reset(self) -> None:
        """Forget all images."""
        self.mean_iou.reset()
        if self.panoptic_quality is not None:
            self.panoptic_quality.reset()
