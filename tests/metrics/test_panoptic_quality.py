import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import tensor

from pem_lightning.files import rgb_to_id
from pem_lightning.metrics import PanopticQuality
from pem_lightning.types import Segment


def load(json_file, folder, classes):
    """Maps and segments of every image of a COCO panoptic annotation, by image id."""
    images = {}
    for annotation in json.loads(json_file.read_text())["annotations"]:
        ids = rgb_to_id(np.asarray(Image.open(folder / annotation["file_name"]).convert("RGB")))
        segments = [
            Segment(s["id"], classes.index(s["category_id"]), is_thing=True, is_crowd=bool(s.get("iscrowd", 0)))
            for s in annotation["segments_info"]
        ]
        images[annotation["image_id"]] = torch.from_numpy(ids), segments
    return images


def evaluate(truth, prediction, categories):
    metric = PanopticQuality(len(categories), [i for i, c in enumerate(categories) if c["isthing"]])
    for image_id, (gt_map, gt_segments) in truth.items():
        metric.update(*prediction[image_id], gt_map, gt_segments)
    return metric.compute()


def square(**areas):
    """A one-row id map: square(a=2) is [1, 1], the n-th keyword being id n and `void` id 0."""
    ids = []
    for n, (name, area) in enumerate(areas.items(), start=1):
        ids += [0 if name == "void" else n] * area
    return tensor([ids], dtype=torch.int32)


class TestOfficialNumbers:
    @pytest.mark.parametrize(
        ("name", "pq", "sq", "rq", "n"),
        [
            ("team", 0.6215628665646188, 0.6466498693487911, None, 2),
            ("all3", 0.7685550311528847, 0.7769173654142754, 0.9888888888888889, 6),
        ],
    )
    def test_deeplab2(self, reference, name, pq, sq, rq, n):
        root = reference / "panoptic_quality" / "deeplab2"
        categories = json.loads((root / f"{name}_gt.json").read_text())["categories"]
        classes = [c["id"] for c in categories]
        truth = load(root / f"{name}_gt.json", root / f"{name}_gt", classes)
        prediction = load(root / f"{name}_pred.json", root / f"{name}_pred", classes)
        result = evaluate(truth, prediction, categories)
        assert result.all.pq == pytest.approx(pq, abs=1e-9)
        assert result.all.sq == pytest.approx(sq, abs=1e-9)
        assert rq is None or result.all.rq == pytest.approx(rq, abs=1e-9)
        assert result.all.num_classes == n

    @pytest.fixture
    def coco(self, reference):
        root = reference / "panoptic_quality" / "coco_sample"
        categories = json.loads((root / "categories.json").read_text())
        classes = [c["id"] for c in categories]
        truth = load(root / "panoptic.json", root / "panoptic", classes)
        shifted = load(root / "pred_shift4.json", root / "pred_shift4", classes)
        return categories, truth, shifted, json.loads((root / "pred_shift4.expected.json").read_text())

    def test_coco_shifted(self, coco):
        categories, truth, shifted, expected = coco
        result = evaluate(truth, shifted, categories)
        for group in ("All", "Things", "Stuff"):
            ours, official = getattr(result, group.lower()), expected[group]
            assert ours.num_classes == official["n"]
            for quality in ("pq", "sq", "rq"):
                assert getattr(ours, quality) == pytest.approx(official[quality], abs=1e-9)
        for k, category in enumerate(categories):
            official = expected["counts"][str(category["id"])]
            counts = result.true_positives[k], result.false_positives[k], result.false_negatives[k]
            assert counts == (official["tp"], official["fp"], official["fn"])
            assert result.iou_sum[k] == pytest.approx(official["iou_sum"], abs=1e-9)
            if any(counts):
                assert result.pq_per_class[k] == pytest.approx(official["pq"], abs=1e-9)

    def test_truth_itself_is_perfect(self, coco):
        categories, truth, _, _ = coco
        without_crowds = {
            image_id: (
                torch.where(torch.isin(ids, tensor([s.id for s in segments if s.is_crowd])), 0, ids),
                [s for s in segments if not s.is_crowd],
            )
            for image_id, (ids, segments) in truth.items()
        }
        result = evaluate(truth, without_crowds, categories)
        assert result.all[:3] == (1.0, 1.0, 1.0)
        assert evaluate(truth, truth, categories).all[:3] == (1.0, 1.0, 1.0)


class TestRules:
    """Three classes: 0 and 1 are things, 2 is stuff. Maps are one row of pixels."""

    def counts(self, pred_map, pred_segments, gt_map, gt_segments):
        metric = PanopticQuality(3, {0, 1})
        metric.update(pred_map, pred_segments, gt_map, gt_segments)
        result = metric.compute()
        return [
            (int(tp), int(fp), int(fn))
            for tp, fp, fn in zip(result.true_positives, result.false_positives, result.false_negatives, strict=True)
        ]

    def test_an_iou_of_exactly_one_half_is_no_match(self):
        counts = self.counts(square(a=2), [Segment(1, 0, True)], square(a=1, b=1), [Segment(1, 0, True)])
        assert counts[0] == (0, 1, 1)

    def test_another_class_is_no_match(self):
        counts = self.counts(square(a=4), [Segment(1, 1, True)], square(a=4), [Segment(1, 0, True)])
        assert counts[:2] == [(0, 0, 1), (0, 1, 0)]

    def test_void_does_not_enlarge_the_union(self):
        # 2 shared pixels of 2; two more in void would make the IoU 0.5
        metric = PanopticQuality(3, {0, 1})
        metric.update(square(a=4), [Segment(1, 0, True)], square(a=2, void=2), [Segment(1, 0, True)])
        assert metric.compute().iou_sum[0] == 1.0

    @pytest.mark.parametrize(("void", "false_positives"), [(5, 1), (6, 0)])
    def test_more_than_half_in_void_is_forgiven(self, void, false_positives):
        gt_map = square(a=10 - void, void=void)
        assert self.counts(square(a=10), [Segment(1, 0, True)], gt_map, [Segment(1, 2, False)])[0] == (
            0,
            false_positives,
            0,
        )

    @pytest.mark.parametrize(("crowd_class", "false_positives"), [(0, 0), (1, 1)])
    def test_a_crowd_forgives_its_own_class_only_and_is_never_missed(self, crowd_class, false_positives):
        crowd = Segment(1, crowd_class, True, is_crowd=True)
        counts = self.counts(square(a=10), [Segment(1, 0, True)], square(a=10), [crowd])
        assert counts[0] == (0, false_positives, 0)
        assert counts[1] == (0, 0, 0)

    def test_void_and_crowd_add_up(self):
        crowd = Segment(1, 0, True, is_crowd=True)
        gt_map = square(a=3, void=3, c=4)
        assert self.counts(square(a=10), [Segment(1, 0, True)], gt_map, [crowd, Segment(3, 2, False)])[0] == (0, 0, 0)

    def test_a_listed_segment_without_pixels_is_missed(self):
        gt_segments = [Segment(1, 0, True), Segment(9, 0, True)]
        assert self.counts(square(a=4), [Segment(1, 0, True)], square(a=4), gt_segments)[0] == (1, 0, 1)

    def test_empty_prediction_misses_everything(self):
        counts = self.counts(square(void=4), [], square(a=2, b=2), [Segment(1, 0, True), Segment(2, 2, False)])
        assert counts == [(0, 0, 1), (0, 0, 0), (0, 0, 1)]

    def test_an_unknown_id_in_the_truth_is_area_of_nothing(self):
        counts = self.counts(square(a=4), [Segment(1, 0, True)], square(a=1, unlisted=3), [Segment(1, 0, True)])
        assert counts[0] == (0, 1, 1)

    def test_classes_that_do_not_occur_are_left_out(self):
        metric = PanopticQuality(3, {0, 1})
        metric.update(square(a=4), [Segment(1, 0, True)], square(a=4), [Segment(1, 0, True)])
        result = metric.compute()
        assert result.all == (1.0, 1.0, 1.0, 1)
        assert result.stuff.num_classes == 0
        assert math.isnan(result.stuff.pq)
        assert np.isnan(result.pq_per_class[1:]).all()


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


@settings(max_examples=150, deadline=None)
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


class TestErrors:
    @pytest.mark.parametrize(
        ("pred_segments", "message"),
        [
            ([], "segment 1 is in the predicted map, but not among"),
            ([Segment(1, 0, True), Segment(7, 0, True)], "segment 7 is among the predicted segments, but not in"),
            ([Segment(1, 0, True), Segment(0, 0, True)], "segment id 0 is void"),
            ([Segment(1, 5, True)], "segment 1 has class 5"),
        ],
    )
    def test_contradictions_are_named(self, pred_segments, message):
        with pytest.raises(ValueError, match=message):
            PanopticQuality(2, {0}).update(square(a=3, void=1), pred_segments, square(a=4), [Segment(1, 0, True)])


class TestState:
    def test_survives_a_cast_of_the_model_to_short_floats(self):
        metric = PanopticQuality(1, {0}).to(torch.bfloat16)
        prediction, truth = square(a=257), square(a=256, b=1)
        metric.update(prediction, [Segment(1, 0, True)], truth, [Segment(1, 0, True)])
        assert metric.compute().iou_sum[0] == pytest.approx(256 / 257, abs=1e-12)

    def test_the_order_of_images_changes_no_bit(self):
        """IoUs of which sums of floats depend on the order."""
        areas = [(a, a + b) for a in range(50, 90) for b in range(1, 40)]

        def measure(order):
            metric = PanopticQuality(1, {0})
            for shared, area in order:
                one = [Segment(1, 0, True)]
                metric.update(square(a=shared, void=area - shared), one, square(a=area), one)
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
