"""The rules of panoptic quality; the official evaluators' numbers are compared in test_panoptic_files.py."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from pem_lightning.metrics import PanopticQuality
from pem_lightning.types import Segment


def square(**areas):
    """A one-row id map: square(a=2) is [1, 1], the n-th keyword being id n and `void` id 0."""
    ids = []
    for n, (name, area) in enumerate(areas.items(), start=1):
        ids += [0 if name == "void" else n] * area
    return tensor([ids], dtype=torch.int32)


A = Segment(1, 0, True)


def counts(pred_map, pred_segments, gt_map, gt_segments):
    """TP, FP, FN of three classes: 0 and 1 are things, 2 is stuff."""
    metric = PanopticQuality(3, {0, 1})
    metric.update(pred_map, pred_segments, gt_map, gt_segments)
    result = metric.compute()
    rows = zip(result.true_positives, result.false_positives, result.false_negatives, strict=True)
    return [tuple(map(int, row)) for row in rows]


class TestRules:
    def test_an_iou_of_exactly_one_half_is_no_match(self):
        assert counts(square(a=2), [A], square(a=1, b=1), [A])[0] == (0, 1, 1)

    def test_another_class_is_no_match(self):
        assert counts(square(a=4), [Segment(1, 1, True)], square(a=4), [A])[:2] == [(0, 0, 1), (0, 1, 0)]

    def test_void_does_not_enlarge_the_union(self):
        # 2 shared pixels of 2; two more in void would make the IoU 0.5
        metric = PanopticQuality(3, {0, 1})
        metric.update(square(a=4), [A], square(a=2, void=2), [A])
        assert metric.compute().iou_sum[0] == 1.0

    @pytest.mark.parametrize(("void", "false_positives"), [(5, 1), (6, 0)])
    def test_more_than_half_in_void_is_forgiven(self, void, false_positives):
        stuff = [Segment(1, 2, False)]
        assert counts(square(a=10), [A], square(a=10 - void, void=void), stuff)[0] == (0, false_positives, 0)

    @pytest.mark.parametrize(("crowd_class", "false_positives"), [(0, 0), (1, 1)])
    def test_a_crowd_forgives_its_own_class_only_and_is_never_missed(self, crowd_class, false_positives):
        crowd = Segment(1, crowd_class, True, is_crowd=True)
        assert counts(square(a=10), [A], square(a=10), [crowd])[:2] == [(0, false_positives, 0), (0, 0, 0)]

    def test_void_and_crowd_add_up(self):
        crowd = Segment(1, 0, True, is_crowd=True)
        true = square(a=3, void=3, c=4)
        assert counts(square(a=10), [A], true, [crowd, Segment(3, 2, False)])[0] == (0, 0, 0)

    def test_empty_prediction_misses_everything(self):
        true = [A, Segment(2, 2, False)]
        assert counts(square(void=4), [], square(a=2, b=2), true) == [(0, 0, 1), (0, 0, 0), (0, 0, 1)]

    def test_classes_that_do_not_occur_are_left_out(self):
        metric = PanopticQuality(3, {0, 1})
        metric.update(square(a=4), [A], square(a=4), [A])
        result = metric.compute()
        assert result.all == (1.0, 1.0, 1.0, 1)
        assert result.stuff.num_classes == 0
        assert math.isnan(result.stuff.pq)
        assert np.isnan(result.pq_per_class[1:]).all()

    @pytest.mark.parametrize("listed", [[], [A, Segment(7, 0, True)], [A, Segment(0, 0, True)]])
    def test_a_prediction_that_contradicts_itself_is_refused(self, listed):
        with pytest.raises(ValueError, match="must list exactly the segments in pred_map"):
            counts(square(a=3, void=1), listed, square(a=4), [A])


def naive_counts(pred_map, pred_segments, gt_map, gt_segments, num_classes):
    """The same definition once more, with one mask per segment."""
    tp, fp, fn, iou_sum = (np.zeros(num_classes) for _ in range(4))
    void, found, used = gt_map == 0, set(), set()
    for g, p in itertools.product(gt_segments, pred_segments):
        if g.is_crowd or g.class_id != p.class_id:
            continue
        true, predicted = gt_map == g.id, (pred_map == p.id) & ~void
        iou = (true & predicted).sum() / max((true | predicted).sum(), 1)
        if iou > 0.5:
            tp[g.class_id] += 1
            iou_sum[g.class_id] += iou
            found.add(g.id)
            used.add(p.id)
    for g in gt_segments:
        fn[g.class_id] += not g.is_crowd and g.id not in found
    for p in pred_segments:
        ignored = void | np.isin(gt_map, [g.id for g in gt_segments if g.is_crowd and g.class_id == p.class_id][-1:])
        fp[p.class_id] += p.id not in used and ignored[pred_map == p.id].mean() <= 0.5
    return tp, fp, fn, iou_sum


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_agrees_with_a_naive_evaluation(seed):
    rng = np.random.default_rng(seed)
    ids = [0, 3, 26001, 7, 2**24 - 1, 1]
    gt_map = rng.choice(ids, (3, 4)).astype(np.int32).repeat(3, 0).repeat(3, 1)
    pred_map = np.where(rng.random(gt_map.shape) < 0.7, gt_map, rng.choice(ids, gt_map.shape)).astype(np.int32)
    gt_segments = [Segment(i, int(rng.integers(2)), True, bool(rng.random() < 0.3)) for i in ids[1:]]
    class_of = {s.id: s.class_id for s in gt_segments}
    pred_segments = [
        Segment(i, class_of[i] if rng.random() < 0.8 else int(rng.integers(2)), True)
        for i in sorted(set(pred_map.ravel().tolist()) - {0}, reverse=True)
    ]
    metric = PanopticQuality(2, {0, 1})
    metric.update(torch.from_numpy(pred_map), pred_segments, torch.from_numpy(gt_map), gt_segments)
    result = metric.compute()
    tp, fp, fn, iou_sum = naive_counts(pred_map, pred_segments, gt_map, gt_segments, 2)
    assert result.true_positives.tolist() == tp.tolist()
    assert result.false_positives.tolist() == fp.tolist()
    assert result.false_negatives.tolist() == fn.tolist()
    assert np.allclose(result.iou_sum, iou_sum, atol=1e-12)


class TestState:
    def test_survives_a_cast_of_the_model_to_short_floats(self):
        metric = PanopticQuality(1, {0}).to(torch.bfloat16)
        prediction, truth = square(a=257), square(a=256, b=1)
        metric.update(prediction, [A], truth, [A])
        assert metric.compute().iou_sum[0] == pytest.approx(256 / 257, abs=1e-12)

    def test_the_order_of_images_changes_no_bit(self):
        """IoUs of which sums of floats depend on the order."""
        areas = [(a, a + b) for a in range(50, 60) for b in range(1, 20)]

        def measure(order):
            metric = PanopticQuality(1, {0})
            for shared, area in order:
                metric.update(square(a=shared, void=area - shared), [A], square(a=area), [A])
            return metric.compute().iou_sum[0]

        ious = [shared / area for shared, area in areas]
        assert measure(areas) == measure(areas[::-1]) == math.fsum(ious)
        assert sum(ious) != sum(ious[::-1])


class TestAreas:
    """panopticapi takes the areas of true segments from the JSON."""

    def measure(self, **areas):
        metric = PanopticQuality(2, {0, 1})
        true = [Segment(1, 0, True), Segment(2, 1, True)]
        given = {{"a": 1, "b": 2}[name]: area for name, area in areas.items()}
        metric.update(square(a=4, b=6), true, square(a=5, b=5), true, given)
        return metric.compute().iou_sum.tolist()

    def test_given_ones_count_instead_of_pixels(self):
        assert self.measure() == [4 / 5, 5 / 6]
        assert self.measure(a=7.0) == [4 / 7, 5 / 6]
        assert self.measure(a=8.0, b=7.0) == [0, 5 / 8]

    def test_an_impossible_one_is_refused(self):
        with pytest.raises(ValueError, match="segment 2 shares more pixels"):
            self.measure(b=1.0)
