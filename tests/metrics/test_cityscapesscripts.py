"""Our metrics against Cityscapes' own evaluation programs, on drawn scenes with every oddity that its labels can have.

The programs run as their users run them; ours gets the same ground truth through our own reading of it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.data import CITYSCAPES, IGNORE_INDEX, CityscapesDataset, generate_synthetic
from pem_lightning.files import id_to_rgb
from pem_lightning.metrics import MeanIoU, PanopticQuality
from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import Segment

pytestmark = pytest.mark.cityscapesscripts
pytest.importorskip(
    "cityscapesscripts", reason="cityscapesScripts is not installed: pip install -r requirements-eval.txt"
)

NUM_IMAGES, WALL, TERRAIN, CARAVAN, TRAIN, MOTORCYCLE = 5, 12, 22, 29, 31, 32
CLASS_OF_LABEL = np.full(256, IGNORE_INDEX)
CLASS_OF_LABEL[list(CITYSCAPES.category_ids)] = np.arange(CITYSCAPES.num_classes)


def label_ids(instance_ids):
    return np.where(instance_ids >= 1000, instance_ids // 1000, instance_ids).astype(np.uint8)


def odd_truth(ids, rng, index):
    """Turns some things into groups and some pixels into labels that are not evaluated; rare and absent classes."""
    ids = ids.copy()
    for value in np.unique(ids[ids >= 24000]).tolist():
        if rng.random() < 0.3:
            ids[ids == value] = value // 1000
    ids[:20, 30:60] = CARAVAN * 1000 + 1
    ids[:20, 60:75] = CARAVAN
    ids[40:60, 100:130] = 0
    ids[np.isin(label_ids(ids), (TERRAIN, TRAIN, WALL, MOTORCYCLE))] = 3
    if index == 2:
        ids[70:110, 10:60] = TRAIN * 1000
        ids[20:60, 10:40] = TERRAIN
    return ids


def odd_prediction(ids, rng):
    """Moves everything, and takes some segments for others, for void, for labels not evaluated, or apart."""
    ids = np.roll(ids, (int(rng.integers(-2, 3)), int(rng.integers(-3, 4))), (0, 1))
    for value in np.unique(ids).tolist():
        mask, fate = ids == value, rng.random()
        if fate < 0.1:
            ids[mask] = 0
        elif fate < 0.2:
            ids[mask] = 21
        elif fate < 0.3:
            ids[mask & (np.arange(ids.shape[1]) % 40 < 20)] = 26777
    ids[100:, 200:] = WALL  # never true
    ids[:20, 80:100] = 4  # static: not evaluated
    return ids


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Ground truth as the archives have it, and predictions of pixels in results/."""
    root = generate_synthetic(tmp_path_factory.mktemp("official") / "cityscapes", train=1, val=NUM_IMAGES, seed=3)
    rng = np.random.default_rng(1)
    (root / "results").mkdir()
    for index, path in enumerate(sorted((root / "gtFine" / "val").rglob("*_instanceIds.png"))):
        with Image.open(path) as image:
            ids = odd_truth(np.array(image), rng, index)
        Image.fromarray(ids).save(path)
        Image.fromarray(label_ids(ids)).save(str(path).replace("instanceIds", "labelIds"))
        predicted = odd_prediction(ids, rng)
        name = path.name.removesuffix("_gtFine_instanceIds.png")
        Image.fromarray(predicted).save(root / "results" / f"{name}_instances.tif")
        Image.fromarray(label_ids(predicted)).save(root / "results" / f"{name}_pred.png")
    return root


def run(root, program, *arguments):
    """Runs one of the official programs."""
    environment = {name: str(root) for name in ("CITYSCAPES_DATASET", "CITYSCAPES_EXPORT_DIR")}
    environment |= {**os.environ, "CITYSCAPES_RESULTS": str(root / "results")}
    command = [sys.executable, "-W", "ignore", "-m", f"cityscapesscripts.{program}", *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mean_iou(root):
    run(root, "evaluation.evalPixelLevelSemanticLabeling")
    official = json.loads((root / "resultPixelLevelSemanticLabeling.json").read_text())

    dataset, metric = CityscapesDataset(root, "val"), MeanIoU(CITYSCAPES.num_classes, IGNORE_INDEX)
    for name, sample in zip(dataset.names, dataset, strict=True):
        with Image.open(root / "results" / f"{name}_pred.png") as image:
            metric.update(torch.from_numpy(CLASS_OF_LABEL[np.array(image)]), sample.class_map())
    ours = metric.compute()
    for name, iou in zip(CITYSCAPES.class_names, ours.iou_per_class, strict=True):
        assert iou == pytest.approx(official["classScores"][name], abs=1e-9, nan_ok=True)
    assert ours.miou == pytest.approx(official["averageScoreClasses"], abs=1e-9)

    occurs = dict(zip(CITYSCAPES.class_names, ~np.isnan(ours.iou_per_class), strict=True))
    assert occurs["terrain"]
    assert ours.iou_per_class[CITYSCAPES.class_names.index("wall")] == 0  # only predicted
    assert not occurs["motorcycle"]
    assert ours.confusion[:, -1].any()  # labelled pixels that were predicted as labels that are not evaluated


def segments_of(ids):
    """Predicted segments: evaluated labels only, one segment per id."""
    classes = {value: int(CLASS_OF_LABEL[label_ids(value)]) for value in map(np.int64, np.unique(ids))}
    evaluated = {int(value): k for value, k in classes.items() if k != IGNORE_INDEX}
    things = CITYSCAPES.thing_classes
    return [Segment(value, k, k in things) for value, k in evaluated.items()]


@pytest.fixture(scope="module")
def panoptic_files(root):
    """The official conversion of the ground truth, and predictions in its format; with the maps by name."""
    run(root, "preparation.createPanopticImgs", "--dataset-folder", root / "gtFine", "--set-names", "val")
    folder, predictions, annotations = root / "panoptic", {}, []
    folder.mkdir()
    for path in sorted((root / "results").glob("*_instances.tif")):
        name = path.name.removesuffix("_instances.tif")
        with Image.open(path) as image:
            ids = np.array(image).astype(np.int32)
        segments = segments_of(ids)
        ids[~np.isin(ids, [s.id for s in segments])] = 0
        predictions[name] = ids, segments
        Image.fromarray(id_to_rgb(ids)).save(folder / f"{name}.png")
        listed = [{"id": s.id, "category_id": CITYSCAPES.category_ids[s.class_id]} for s in segments]
        annotations.append({"image_id": name, "file_name": f"{name}.png", "segments_info": listed})
    (root / "panoptic.json").write_text(json.dumps({"annotations": annotations}))
    gt_json, results = root / "gtFine" / "cityscapes_panoptic_val.json", root / "results.json"
    files = ("--gt-json-file", gt_json, "--prediction-json-file", root / "panoptic.json")
    run(root, "evaluation.evalPanopticSemanticLabeling", *files, "--results_file", results)
    return gt_json, root / "panoptic.json", predictions, json.loads(results.read_text())


def test_panoptic_quality(root, panoptic_files):
    _, _, predictions, official = panoptic_files
    metric = PanopticQuality(CITYSCAPES.num_classes, CITYSCAPES.thing_classes)
    dataset, crowds = CityscapesDataset(root, "val"), 0
    for sample in dataset:
        ids, segments = predictions[sample.name]
        metric.update(torch.from_numpy(ids), segments, sample.panoptic, sample.segments)
        crowds += sum(s.is_crowd for s in sample.segments)
    ours = metric.compute()
    for group in ("All", "Things", "Stuff"):
        pq, sq, rq, n = getattr(ours, group.lower())
        assert {"pq": pq, "sq": sq, "rq": rq, "n": n} == pytest.approx(official[group], abs=1e-9)
    for k, label in enumerate(CITYSCAPES.category_ids):
        mine = ours.pq_per_class[k], ours.sq_per_class[k], ours.rq_per_class[k]
        theirs = [official["per_class"][str(label)][key] for key in ("pq", "sq", "rq")]
        assert np.nan_to_num(mine) == pytest.approx(theirs, abs=1e-9)

    assert crowds > 3
    assert ours.true_positives.sum() > 20
    assert ours.false_positives[CITYSCAPES.class_names.index("wall")] > 0
    assert np.isnan(ours.pq_per_class).sum() == 1


def test_panoptic_files(panoptic_files):
    gt_json, pred_json, _, official = panoptic_files
    ours = evaluate_panoptic_files(gt_json, pred_json).to_dict()
    assert ours["notes"] == []
    for group in ("All", "Things", "Stuff"):
        assert ours[group] == pytest.approx(official[group], abs=1e-9)
    for label, values in official["per_class"].items():
        assert {key: ours["per_class"][label][key] for key in values} == pytest.approx(values, abs=1e-9)
