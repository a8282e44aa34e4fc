"""Panoptic quality (Kirillov et al., CVPR 2019) with the exact rules of panopticapi, COCO's and Cityscapes' evaluator.

K classes, G true segments, P predicted segments, H W spatial;
overlap[g, p] counts pixels; the last two rows and columns are void (-2) and ids of no known segment (-1).
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

_UNIT_BITS, _LOW_BITS = 53, 27
"""IoUs of matches, floats from 0.5 on, are whole multiples of 2**-53: summed exactly as high parts and low 27 bits."""


class QualityAverage(NamedTuple):
    """Averages, in [0, 1], over those classes of a group that occur in truth or prediction; NaN where none does.

    PQ = SQ * RQ for a single class: the mean IoU of matched segments times the F1 score of detection.
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
    """Panoptic quality over a data set, the same to the last bit in any order of images and on any number of processes.

    Segments match when they have the same class and an IoU above 0.5, which makes matches unique. Crowds are neither
    matched nor missed. A prediction without a match is forgiven when more than half of it lies in void or in its
    class's crowd.
    """

    full_state_update = False
    higher_is_better = True

    iou_parts: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, thing_classes: Collection[int]) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.is_thing = np.isin(np.arange(num_classes), list(thing_classes))
        self.add_state("iou_parts", torch.zeros(2, num_classes, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(3, num_classes, dtype=torch.int64), dist_reduce_fx="sum")  # TP, FP, FN

    def update(
        self,
        pred_map: Int32[Tensor, "H W"],
        pred_segments: Sequence[Segment],
        gt_map: Int32[Tensor, "H W"],
        gt_segments: Sequence[Segment],
        gt_areas: Mapping[int, float] | None = None,
    ) -> None:
        """Add one image: ids of all pixels, `VOID_ID` for none, and what they are.

        A true segment without pixels is missed by definition. `gt_areas` are areas in pixels by segment id, where those
        in `gt_map` do not count: panopticapi takes the JSON's.

        Raises:
            ValueError: prediction's map and segments do not agree, or a given area is smaller than what the segment
                shares with a prediction.
        """
        predicted, true = {s.id: s for s in pred_segments}, {s.id: s for s in gt_segments}
        overlap = _overlap(gt_map.to(pred_map.device), pred_map, list(true), list(predicted))
        if VOID_ID in predicted or overlap[:, -1].any() or not overlap[:, :-2].any(0).all():
            listed, present = sorted(predicted), sorted(set(pred_map.unique().tolist()) - {VOID_ID})
            raise ValueError(f"pred_segments must list exactly the segments in pred_map: {listed} and {present} differ")

        gt_class = np.array([s.class_id for s in true.values()], np.int64)
        pred_class = np.array([s.class_id for s in predicted.values()], np.int64)
        is_crowd = np.array([s.is_crowd for s in true.values()], bool)
        pixels = dict(zip(true, overlap[:-2].sum(1).tolist(), strict=True)) | dict(gt_areas or {})
        iou = _ious(overlap, np.array([pixels[segment_id] for segment_id in true], np.float64))
        match = (iou > 0.5) & (gt_class[:, None] == pred_class) & ~is_crowd[:, None]  # [G, P]
        gt_hit, pred_hit = np.nonzero(match)
        if (too_much := iou[gt_hit, pred_hit] > 1).any():
            segment_id = list(true)[gt_hit[too_much.argmax()]]
            raise ValueError(f"segment {segment_id} shares more pixels with a prediction than its given area allows")
        missed = ~is_crowd & ~match.any(1)
        wrong = ~match.any(0) & ~_forgiven(overlap, gt_class, pred_class, is_crowd)

        K, device = self.num_classes, self.iou_parts.device
        units = np.ldexp(iou[gt_hit, pred_hit], _UNIT_BITS).astype(np.int64)
        parts = np.zeros((2, K), np.int64)
        np.add.at(parts[0], gt_class[gt_hit], units >> _LOW_BITS)
        np.add.at(parts[1], gt_class[gt_hit], units & (2**_LOW_BITS - 1))
        self.iou_parts += torch.from_numpy(parts).to(device)
        counts = (gt_class[gt_hit], pred_class[wrong], gt_class[missed])
        self.counts += torch.from_numpy(np.stack([np.bincount(k, minlength=K) for k in counts])).to(device)

    def compute(self) -> PanopticResult:
        """Quality per class and averaged over the classes that occurred."""
        high, low = self.iou_parts.tolist()
        # Python's integers do not overflow, and their quotient is rounded once.
        iou_sum = np.array([(h * 2**_LOW_BITS + w) / 2**_UNIT_BITS for h, w in zip(high, low, strict=True)])
        tp, fp, fn = self.counts.cpu().numpy()
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


def _overlap(
    gt_map: Int32[Tensor, "H W"], pred_map: Int32[Tensor, "H W"], gt_ids: list[int], pred_ids: list[int]
) -> Int64[np.ndarray, "rows columns"]:
    """Pixels that each pair shares."""
    true, predicted = gt_map.flatten(), pred_map.flatten()
    changes = (true[1:] != true[:-1]) | (predicted[1:] != predicted[:-1])
    # Runs of pixels with the same pair are far fewer than pixels.
    starts = torch.cat([changes.new_ones(1), changes])[: true.numel()].nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([true.numel()]))
    rows, columns = len(gt_ids) + 2, len(pred_ids) + 2
    pairs = _positions(true[starts], gt_ids) * columns + _positions(predicted[starts], pred_ids)
    return lengths.new_zeros(rows * columns).index_add_(0, pairs, lengths).view(rows, columns).cpu().numpy()


def _positions(values: Int32[Tensor, " runs"], ids: list[int]) -> Int64[Tensor, " runs"]:
    """Each value's position in [*ids, void]; one past the end for other values."""
    known, order = torch.tensor([*ids, VOID_ID], dtype=torch.int32, device=values.device).sort()
    found = torch.searchsorted(known, values).clamp_(max=len(known) - 1)
    return torch.where(known[found] == values, order[found], len(known))


def _ious(overlap: Int64[np.ndarray, "rows columns"], gt_area: Float64[np.ndarray, " G"]) -> Float64[np.ndarray, "G P"]:
    """IoU of every pair; a prediction's pixels in void do not count as its area."""
    intersection, in_void, pred_area = overlap[:-2, :-2], overlap[-2, :-2], overlap.sum(0)[:-2]
    union = gt_area[:, None] + pred_area - intersection - in_void
    return intersection / np.maximum(union, 0.5)  # empty when both lie in void only: IoU 0


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
