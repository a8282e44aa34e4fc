"""Panoptic quality with the exact rules of panopticapi, the official evaluator of COCO and Cityscapes.

Kirillov et al., Panoptic Segmentation, CVPR 2019.

K classes, G ground-truth segments, P predicted segments, H W spatial;
rows and columns: the segments, then void, then ids of no known segment
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int32, Int64
from torch import Tensor
from torchmetrics import Metric

from pem_lightning.types import VOID_ID, Segment


class QualityAverage(NamedTuple):
    """Averages over those classes of a group that occur in ground truth or prediction; NaN where none does.

    Attributes:
        pq: panoptic quality, in [0, 1].
        sq: segmentation quality, the mean IoU of matched segments, in [0, 1].
        rq: recognition quality, the F1 score of detection, in [0, 1].
        num_classes: how many classes the averages are over.
    """

    pq: float
    sq: float
    rq: float
    num_classes: int


class PanopticResult(NamedTuple):
    """Panoptic quality of a whole data set. In per-class arrays, classes that do not occur are NaN."""

    all: QualityAverage
    things: QualityAverage
    stuff: QualityAverage
    pq_per_class: Float64[np.ndarray, " K"]
    sq_per_class: Float64[np.ndarray, " K"]
    rq_per_class: Float64[np.ndarray, " K"]
    iou_sum: Float64[np.ndarray, " K"]
    true_positives: Int64[np.ndarray, " K"]
    false_positives: Int64[np.ndarray, " K"]
    false_negatives: Int64[np.ndarray, " K"]


class PanopticQuality(Metric):
    """Panoptic quality over a data set, summed correctly over processes.

    Segments match when they have the same class and overlap with an IoU above 0.5, which makes matches unique.
    Crowds are neither matched nor missed. A prediction without a match is forgiven when more than half of it lies
    in void or in its class's crowd.

    Args:
        num_classes: K.
        thing_classes: which of them are things; the rest is stuff.
    """

    full_state_update = False
    higher_is_better = True

    iou_sum: Tensor
    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor

    def __init__(self, num_classes: int, thing_classes: Collection[int]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.is_thing = np.isin(np.arange(num_classes), list(thing_classes))
        self.add_state("iou_sum", torch.zeros(num_classes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("true_positives", "false_positives", "false_negatives"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        pred_map: Int32[Tensor, "H W"],
        pred_segments: Sequence[Segment],
        gt_map: Int32[Tensor, "H W"],
        gt_segments: Sequence[Segment],
    ) -> None:
        """Adds one image.

        Args:
            pred_map: predicted segment id of every pixel, `VOID_ID` for none.
            pred_segments: exactly the segments in `pred_map`.
            gt_map: true segment id of every pixel, `VOID_ID` where it is unknown.
            gt_segments: what they are. A listed segment without pixels is missed by definition.

        Raises:
            ValueError: prediction's map and segments do not agree, or a class does not exist.
        """
        predicted, true = {s.id: s for s in pred_segments}, {s.id: s for s in gt_segments}
        self._check_classes(predicted, true)
        overlap = _intersections(gt_map.to(pred_map.device), pred_map, list(true), list(predicted))
        _check_agreement(overlap, pred_map, list(predicted))

        gt_class = np.array([s.class_id for s in true.values()], np.int64)
        pred_class = np.array([s.class_id for s in predicted.values()], np.int64)
        is_crowd = np.array([s.is_crowd for s in true.values()], bool)
        iou = _ious(overlap)
        match = (iou > 0.5) & (gt_class[:, None] == pred_class) & ~is_crowd[:, None]  # [G, P]
        gt_hit, pred_hit = np.nonzero(match)
        missed = ~is_crowd & ~match.any(1)
        wrong = ~match.any(0) & ~_forgiven(overlap, gt_class, pred_class, is_crowd)

        K, device = self.num_classes, self.iou_sum.device
        iou_sum = np.bincount(pred_class[pred_hit], weights=iou[gt_hit, pred_hit], minlength=K)
        # .double(): a model cast to a short float type takes its metrics' zeros along
        self.iou_sum = self.iou_sum.double() + torch.from_numpy(iou_sum).to(device)
        self.true_positives += torch.from_numpy(np.bincount(gt_class[gt_hit], minlength=K)).to(device)
        self.false_positives += torch.from_numpy(np.bincount(pred_class[wrong], minlength=K)).to(device)
        self.false_negatives += torch.from_numpy(np.bincount(gt_class[missed], minlength=K)).to(device)

    def compute(self) -> PanopticResult:
        """Quality per class and averaged over the classes that occurred."""
        iou_sum = self.iou_sum.double().cpu().numpy()
        tp, fp, fn = (x.cpu().numpy() for x in (self.true_positives, self.false_positives, self.false_negatives))
        seen = tp + fp + fn > 0
        detections = np.where(seen, tp + 0.5 * fp + 0.5 * fn, np.nan)
        pq, rq = iou_sum / detections, tp / detections
        sq = np.where(seen, iou_sum / np.maximum(tp, 1), np.nan)

        def average(group: Bool[np.ndarray, " K"]) -> QualityAverage:
            occurring = group & seen
            if not occurring.any():
                return QualityAverage(float("nan"), float("nan"), float("nan"), 0)
            mean_pq, mean_sq, mean_rq = (float(quality[occurring].mean()) for quality in (pq, sq, rq))
            return QualityAverage(mean_pq, mean_sq, mean_rq, int(occurring.sum()))

        groups = (average(seen), average(self.is_thing), average(~self.is_thing))
        return PanopticResult(*groups, pq, sq, rq, iou_sum, tp, fp, fn)

    def _check_classes(self, *groups: Mapping[int, Segment]) -> None:
        for segment in (s for group in groups for s in group.values()):
            if not 0 <= segment.class_id < self.num_classes:
                raise ValueError(f"segment {segment.id} has class {segment.class_id}, not in 0..{self.num_classes - 1}")


def _intersections(
    gt_map: Int32[Tensor, "H W"], pred_map: Int32[Tensor, "H W"], gt_ids: list[int], pred_ids: list[int]
) -> Int64[np.ndarray, "rows columns"]:
    """Pixels that each pair shares."""
    rows, columns = len(gt_ids) + 2, len(pred_ids) + 2
    pairs = _positions(gt_map, gt_ids) * columns + _positions(pred_map, pred_ids)
    return torch.bincount(pairs, minlength=rows * columns).view(rows, columns).cpu().numpy()


def _positions(id_map: Int32[Tensor, "H W"], ids: list[int]) -> Int64[Tensor, " H*W"]:
    """Each pixel's position in [*ids, void]; one past the end for other ids."""
    known, order = torch.tensor([*ids, VOID_ID], dtype=torch.int32, device=id_map.device).sort()
    found = torch.searchsorted(known, id_map.flatten()).clamp_(max=len(known) - 1)
    return torch.where(known[found] == id_map.flatten(), order[found], len(known))


def _check_agreement(
    overlap: Int64[np.ndarray, "rows columns"], pred_map: Int32[Tensor, "H W"], pred_ids: list[int]
) -> None:
    areas = overlap.sum(0)
    if VOID_ID in pred_ids:
        raise ValueError(f"segment id {VOID_ID} is void and cannot be predicted")
    if areas[-1]:
        stray = set(pred_map.unique().tolist()) - {VOID_ID, *pred_ids}
        raise ValueError(f"segment {min(stray)} is in the predicted map, but not among the predicted segments")
    for segment_id, area in zip(pred_ids, areas, strict=False):
        if area == 0:
            raise ValueError(f"segment {segment_id} is among the predicted segments, but not in the predicted map")


def _ious(overlap: Int64[np.ndarray, "rows columns"]) -> Float64[np.ndarray, "G P"]:
    """IoU of every pair; what a prediction has in void does not count as its area."""
    intersection, in_void = overlap[:-2, :-2], overlap[-2, :-2]
    gt_area, pred_area = overlap.sum(1)[:-2], overlap.sum(0)[:-2]
    union = gt_area[:, None] + pred_area - intersection - in_void
    return intersection / np.maximum(union, 1)  # the union is empty when both lie in void only: IoU 0


def _forgiven(
    overlap: Int64[np.ndarray, "rows columns"],
    gt_class: Int64[np.ndarray, " G"],
    pred_class: Int64[np.ndarray, " P"],
    is_crowd: Bool[np.ndarray, " G"],
) -> Bool[np.ndarray, " P"]:
    """Predictions of which more than half lies in void or in their class's crowd (panopticapi: in its last crowd)."""
    ignored = overlap[-2, :-2].copy()
    crowd_of_class = {int(gt_class[g]): g for g in np.flatnonzero(is_crowd)}
    for p, class_id in enumerate(pred_class):
        if class_id in crowd_of_class:
            ignored[p] += overlap[crowd_of_class[class_id], p]
    return ignored / overlap.sum(0)[:-2] > 0.5
