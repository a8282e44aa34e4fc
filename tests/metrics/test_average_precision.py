"""COCO's evaluator on JSON files, as everybody uses it, decides what is right."""

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pem_lightning.metrics import AveragePrecision, instance_f1
from pem_lightning.types import Segment

K, SIZE = 5, (150, 200)
STUFF = 4


def draw(seed, levels=0):
    """One image: an id map of rectangles with its segments, and detections that are near them or anywhere.

    With `levels`, scores are rounded to so many values, so that there are ties.
    """
    rng = np.random.default_rng(seed)
    ids, segments = torch.zeros(SIZE, dtype=torch.int32), []
    detections = []
    for number in range(1, rng.integers(2, 14)):
        class_id, box = int(rng.integers(0, K)), box_of(rng)
        ids[box] = number
        crowd = bool(class_id != STUFF and rng.random() < 0.15)
        segments.append(Segment(number, class_id, class_id != STUFF, is_crowd=crowd))
        if class_id != STUFF and rng.random() < 0.8:
            mask = torch.zeros(SIZE, dtype=torch.bool)
            mask[box] = True
            mask = mask.roll(tuple(rng.integers(-3, 4, 2).tolist()), (0, 1))
            detections.append((mask, class_id if rng.random() < 0.9 else int(rng.integers(0, STUFF)), rng.random()))
    for _ in range(rng.integers(0, 4)):
        mask = torch.zeros(SIZE, dtype=torch.bool)
        mask[box_of(rng)] = True
        detections.append((mask, int(rng.integers(0, STUFF)), rng.random()))
    if levels:
        detections = [(mask, k, round(score * levels) / levels) for mask, k, score in detections]
    return detections, ids, tuple(segments), f"image_{seed:03d}"


def box_of(rng):
    height, width = rng.integers(4, 120, 2)
    top, left = rng.integers(0, SIZE[0] - 4), rng.integers(0, SIZE[1] - 4)
    return slice(top, min(top + height, SIZE[0])), slice(left, min(left + width, SIZE[1]))


def run_lengths(mask):
    encoded = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def files(folder, images):
    """What a COCO user has: the annotation and the results as JSON files."""
    annotations, results = [], []
    for image_id, (detections, ids, segments, _) in enumerate(images, start=1):
        for s in segments:
            rle = run_lengths(ids == s.id)
            if s.is_thing and coco_mask.area(rle):
                entry = {"image_id": image_id, "category_id": s.class_id + 10, "iscrowd": int(s.is_crowd)}
                more = {"area": int(coco_mask.area(rle)), "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": rle}
                annotations.append({"id": len(annotations) + 1, **entry, **more})
        for mask, class_id, score in detections:
            entry = {"image_id": image_id, "category_id": class_id + 10, "score": score}
            results.append({**entry, "segmentation": run_lengths(mask)})
    sizes = [{"id": i + 1, "height": SIZE[0], "width": SIZE[1]} for i in range(len(images))]
    categories = [{"id": k + 10, "name": str(k)} for k in range(K)]
    truth = {"info": {}, "images": sizes, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "truth.json", folder / "results.json"


def official(truth, results, class_id=None):
    """The six APs as `summarize` prints them, NaN for its -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotation = COCO(str(truth))
        evaluation = COCOeval(annotation, annotation.loadRes(str(results)), "segm")
        if class_id is not None:
            evaluation.params.catIds = [class_id + 10]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [math.nan if value == -1 else value for value in evaluation.stats[:6]]


def evaluated(images):
    metric = AveragePrecision(K)
    for image in images:
        metric.update(*image)
    return metric.compute()


@pytest.mark.parametrize(("levels", "first"), [(0, 0), (0, 100), (5, 200)])
def test_equals_cocoeval_on_json_files(tmp_path, levels, first):
    images = [draw(first + i, levels) for i in range(12)]
    paths = files(tmp_path, images)
    result = evaluated(images)
    assert result.all == pytest.approx(official(*paths), abs=1e-9, nan_ok=True)
    assert 0.05 < result.all.ap < result.all.ap50 < 1  # else the test would say little
    for class_id in range(K):
        expected = official(*paths, class_id)
        assert result.by_class[class_id] == pytest.approx(expected, abs=1e-9, nan_ok=True)
    single = [s.class_id for _, ids, segments, _ in images for s in segments if not s.is_crowd and (ids == s.id).any()]
    assert result.num_objects.tolist() == [*(single.count(k) for k in range(STUFF)), 0]


def test_equal_scores_are_ranked_the_same_in_any_order_of_images():
    images = [draw(i, levels=3) for i in range(8)]
    assert evaluated(images[::-1]).all == evaluated(images).all


@pytest.mark.parametrize("levels", [0, 3])
def test_the_order_of_an_images_instances_is_by_score_anyway(levels):
    images = [draw(i, levels) for i in range(8)]
    by_score = [(sorted(found, key=lambda d: -d[2]), *more) for found, *more in images]
    assert any(scores != sorted(scores, reverse=True) for scores in ([d[2] for d in image[0]] for image in images))
    assert evaluated(by_score).all == evaluated(images).all


SEGMENTS = (Segment(1, 0, True), Segment(2, STUFF, False))


@pytest.mark.parametrize(
    ("segments", "found", "ap"),
    [
        (SEGMENTS, True, 1),
        ((*SEGMENTS, Segment(7, 0, True)), True, 1),  # without pixels, it is not missed
        (SEGMENTS, False, 0),
        (SEGMENTS[1:], True, math.nan),
        ((Segment(1, 0, True, is_crowd=True), SEGMENTS[1]), True, math.nan),
    ],
)
def test_rules(segments, found, ap):
    """On a thing of 40x40 pixels with stuff around it."""
    ids = torch.full((50, 80), 2, dtype=torch.int32)
    ids[:40, :40] = 1
    result = evaluated([([(ids == 1, 0, 0.3)] if found else [], ids, segments, "a")])
    expected = (ap, ap, ap, math.nan, ap, math.nan)
    assert result.all == pytest.approx(expected, nan_ok=True)  # COCO's own comes within rounding
    assert result.by_class[0] == pytest.approx(expected, nan_ok=True)
    assert math.isnan(result.by_class[1].ap)
    assert result.num_objects.tolist() == [int(not math.isnan(ap)), 0, 0, 0, 0]


def test_pycocotools_prints_nothing(capsys):
    evaluated([draw(0)])
    assert capsys.readouterr().out == ""


def test_keeps_run_lengths_instead_of_masks():
    metric, images = AveragePrecision(K), [draw(i) for i in range(4)]
    for image in images:
        metric.update(*image)
    kept = sum(line.numel() for line in metric.lines)
    masks = sum((len(detections) + len(segments)) * SIZE[0] * SIZE[1] for detections, _, segments, _ in images)
    assert kept < masks / 100
    metric.reset()
    assert len(metric.lines) == 0


MAP = torch.tensor([1, 1, 2, 2, 3, 3], dtype=torch.int32).repeat(6, 1)
"""Two things of class 0 and a crowd of class 1, each a third of the image."""
OBJECTS = (Segment(1, 0, True), Segment(2, 0, True), Segment(3, 1, True, is_crowd=True))
FIRST, SECOND = (MAP == 1, 0, 0.9), (MAP == 2, 0, 0.9)


@pytest.mark.parametrize(
    ("detections", "f1"),
    [
        ([FIRST, SECOND], 1),
        ([FIRST], 2 / 3),
        ([], 0),
        ([FIRST, (MAP == 2, 0, 0.4)], 2 / 3),  # not confident
        ([FIRST, SECOND, (MAP == 1, 0, 0.8)], 4 / 5),  # found twice
        ([FIRST, SECOND, (MAP == 1, 1, 0.8)], 4 / 5),  # another class
        ([FIRST, SECOND, (MAP == 9, 1, 0.8)], 4 / 5),  # without pixels
        ([(MAP < 3, 0, 0.9)], 2 / 3),  # an IoU of one half
        ([(MAP < 9, 0, 0.9)], 0),  # an IoU of one third
        ([FIRST, SECOND, (MAP == 3, 1, 0.8)], 1),  # in its class's crowd
        ([FIRST, SECOND, (MAP == 3, 0, 0.8)], 4 / 5),  # in another class's crowd
    ],
)
def test_f1_of_an_image(detections, f1):
    assert instance_f1(detections, MAP, OBJECTS) == pytest.approx(f1)


def test_f1_without_true_objects():
    assert math.isnan(instance_f1([], MAP, OBJECTS[2:]))
    assert instance_f1([FIRST], MAP, ()) == 0
