"""Files scored as panopticapi scores them: its frozen numbers, its rules, and its code as cityscapesScripts has it."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import UserError
from tests.panoptic_files import CATEGORIES, segment, write_panoptic


def evaluate(tmp_path, truth, prediction):
    """Scores of one image or several, given by image id as (id map, segments)."""
    gt_json = write_panoptic(tmp_path / "gt.json", truth, categories=CATEGORIES)
    return evaluate_panoptic_files(gt_json, write_panoptic(tmp_path / "pred.json", prediction))


def counts(result, category=1):
    k = result.info.category_ids.index(category)
    quality = result.quality
    return tuple(int(c[k]) for c in (quality.true_positives, quality.false_positives, quality.false_negatives))


class TestFrozenNumbers:
    @pytest.mark.parametrize(
        ("name", "pq", "sq", "rq", "n"),
        [
            ("team", 0.6215628665646188, 0.6466498693487911, None, 2),
            ("all3", 0.7685550311528847, 0.7769173654142754, 0.9888888888888889, 6),
        ],
    )
    def test_deeplab2(self, reference, name, pq, sq, rq, n):
        root = reference / "panoptic_quality" / "deeplab2"
        result = evaluate_panoptic_files(root / f"{name}_gt.json", root / f"{name}_pred.json")
        average = result.quality.all
        assert (average.pq, average.sq) == pytest.approx((pq, sq), abs=1e-9)
        assert rq is None or average.rq == pytest.approx(rq, abs=1e-9)
        assert (average.num_classes, result.notes) == (n, ())

    @pytest.mark.parametrize(("name", "expected"), [("panoptic", "identity"), ("pred_shift4", "pred_shift4")])
    def test_coco(self, reference, tmp_path, name, expected):
        root = reference / "panoptic_quality" / "coco_sample"
        content = json.loads((root / "panoptic.json").read_text())
        content["categories"] = json.loads((root / "categories.json").read_text())
        gt_json = tmp_path / "gt.json"
        gt_json.write_text(json.dumps(content))
        result = evaluate_panoptic_files(gt_json, root / f"{name}.json", gt_folder=root / "panoptic")
        ours, official = result.to_dict(), json.loads((root / f"{expected}.expected.json").read_text())
        for group in ("All", "Things", "Stuff"):
            assert ours[group] == pytest.approx(official[group], abs=1e-9)
        assert ours["per_class"].keys() == official["counts"].keys()
        for category, values in official["counts"].items():
            mine = ours["per_class"][category]
            for key, value in values.items():
                assert mine[key] == (value if key == "name" else pytest.approx(value, abs=1e-9))


class TestRules:
    """What panopticapi accepts, though the training data may not have it."""

    @pytest.mark.parametrize(
        ("ids", "segments", "expected", "note"),
        [
            ([7, 7, 7], [segment(7, 1), segment(8, 1)], (1, 0, 1), ""),  # without pixels it is missed
            ([7, 9, 9], [segment(7, 1)], (0, 1, 1), "1 image(s) have ids in the PNG of no counted segment"),
            ([7, 9, 9], [segment(7, 1), segment(9, 77)], (0, 1, 1), "1 segment(s) have a category_id that no category"),
            ([7, 7, 7], [segment(7, 1, area=6)], (0, 1, 1), "1 segment(s) have another area than pixels"),  # 3 / 6
        ],
    )
    def test_odd_ground_truth(self, tmp_path, ids, segments, expected, note):
        result = evaluate(tmp_path, {1: ([ids], segments)}, {1: ([[5, 5, 5]], [segment(5, 1)])})
        assert counts(result) == expected
        assert note in "".join(result.notes[:1])

    @pytest.mark.parametrize("area", [{}, {"area": None}, {"area": 4}, {"area": 4.0}])
    def test_pixels_count_where_there_is_no_area(self, tmp_path, area):
        truth = {1: ([[7, 7, 7, 7]], [segment(7, 1, **area)])}
        result = evaluate(tmp_path, truth, {1: ([[5, 5, 5, 0]], [segment(5, 1)])})
        assert result.quality.iou_sum[1] == 0.75
        assert result.notes == ()

    def test_a_prediction_may_use_the_id_0(self, tmp_path):
        prediction = {1: ([[0, 0, 5]], [segment(0, 1), segment(5, 200)])}
        truth = {1: ([[7, 7, 8]], [segment(7, 1), segment(8, 200)])}
        assert evaluate(tmp_path, truth, prediction).quality.all.pq == 1.0

    def test_whole_numbers_may_have_a_point(self, tmp_path):
        truth = {1: ([[7]], [segment(7.0, 1.0)])}
        assert counts(evaluate(tmp_path, truth, {1.0: ([[5]], [segment(5.0, 1)])})) == (1, 0, 0)

    def test_other_images_do_not_count(self, tmp_path):
        prediction = {1: ([[5]], [segment(5, 1)]), "2": ([[5]], [segment(5, 555)])}
        result = evaluate(tmp_path, {1: ([[7]], [segment(7, 1)])}, prediction)
        assert (counts(result), result.num_images) == ((1, 0, 0), 1)
        assert "1 image(s) are not in the ground truth" in result.notes[0]

    def test_a_fourth_channel_and_more_classes_than_training_can_have(self, tmp_path):
        categories = [{"id": 1000 * i, "name": "same", "isthing": i % 2} for i in range(600)]
        truth = {1: ([[2**24 - 1, 1]], [segment(2**24 - 1, 599_000), segment(1, 0)])}
        gt_json = write_panoptic(tmp_path / "gt.json", truth, categories=categories)
        pred_json = write_panoptic(tmp_path / "pred.json", truth)
        png = tmp_path / "pred" / "1.png"
        with Image.open(png) as image:
            image.convert("RGBA").save(png)
        assert evaluate_panoptic_files(gt_json, pred_json).quality.all == (1.0, 1.0, 1.0, 2)

    def test_a_group_without_classes_has_no_average(self, tmp_path):
        result = evaluate(tmp_path, {1: ([[7]], [segment(7, 1)])}, {1: ([[5]], [segment(5, 1)])})
        assert math.isnan(result.quality.stuff.pq)
        assert result.to_dict()["Stuff"] == {"pq": None, "sq": None, "rq": None, "n": 0}
        assert result.to_dict()["per_class"]["200"]["pq"] == 0.0

    def test_an_area_that_cannot_be_is_refused(self, tmp_path):
        truth = {"x": ([[7, 7, 7]], [segment(7, 1, area=1)])}
        with pytest.raises(UserError, match=r"gt\.json, image 'x': segment 7 shares more pixels .* give its number"):
            evaluate(tmp_path, truth, {"x": ([[5, 5, 5]], [segment(5, 1)])})


def random_files(rng, root, images=6):
    """Files with crowds, void, big ids, segments without pixels, unlisted ids, wrong areas and an unknown category."""
    pool = [1, 3, 255, 256, 26001, 65536, 2**24 - 1]
    truth, prediction = {}, {}
    for image_id in range(images):
        gt_map = rng.choice([0, 11, *pool], (3, 5)).repeat(4, 0).repeat(4, 1)
        pred_map = np.where(rng.random(gt_map.shape) < 0.8, gt_map, rng.choice([0, 11, *pool], gt_map.shape))
        gt_segments = [
            segment(i, int(rng.choice([200, 1, 90, 77], p=[0.3, 0.35, 0.3, 0.05])), iscrowd=int(rng.random() < 0.2))
            for i in map(int, rng.permutation(pool))
        ]
        for s in gt_segments:
            s["area"] = int((gt_map == s["id"]).sum()) + int(rng.integers(4)) * int(rng.random() < 0.2)
        class_of = {s["id"]: s["category_id"] for s in gt_segments if s["category_id"] != 77}
        pred_segments = [
            segment(i, class_of.get(i, 1) if rng.random() < 0.9 else 200) for i in set(pred_map.ravel().tolist()) - {0}
        ]
        truth[image_id], prediction[image_id] = (gt_map, gt_segments), (pred_map, pred_segments)
    gt_json = write_panoptic(root / "gt.json", truth, categories=CATEGORIES)
    return gt_json, write_panoptic(root / "pred.json", prediction)


def test_any_number_of_workers_gives_the_same_bits_and_errors(tmp_path):
    files = random_files(np.random.default_rng(5), tmp_path)
    alone, two = (evaluate_panoptic_files(*files, workers=workers).to_dict() for workers in (0, 2))
    assert alone == two
    assert alone["All"]["pq"] > 0.1
    for image_id in (2, 4):
        (tmp_path / "pred" / f"{image_id}.png").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UserError, match=str(tmp_path / "pred" / "2.png")):
            evaluate_panoptic_files(*files, workers=workers)


@pytest.mark.cityscapesscripts
@pytest.mark.parametrize("seed", range(10))
def test_random_files_score_as_official(tmp_path, seed):
    """cityscapesScripts has a copy of panopticapi's evaluation of files."""
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPanopticSemanticLabeling",
        reason="cityscapesScripts is not installed: pip install -r requirements-eval.txt",
    )
    gt_json, pred_json = random_files(np.random.default_rng(seed), tmp_path)
    truth, prediction = (json.loads(path.read_text())["annotations"] for path in (gt_json, pred_json))
    categories = {c["id"]: c for c in CATEGORIES}
    folders = str(gt_json.with_suffix("")), str(pred_json.with_suffix(""))
    pairs = list(zip(truth, prediction, strict=True))
    stat = official.pq_compute_single_core(0, pairs, *folders, categories)
    expected = official.average_pq(stat, categories)

    ours = evaluate_panoptic_files(gt_json, pred_json).to_dict()
    for group in ("All", "Things", "Stuff"):
        assert ours[group] == pytest.approx(expected[group], abs=1e-9)
    for category, values in expected["per_class"].items():
        mine = ours["per_class"][str(category)]
        assert {key: mine[key] for key in values} == pytest.approx(values, abs=1e-9)
        assert [mine[key] for key in ("tp", "fp", "fn")] == [getattr(stat[category], key) for key in ("tp", "fp", "fn")]
    assert sum(mine["tp"] for mine in ours["per_class"].values()) > 5
