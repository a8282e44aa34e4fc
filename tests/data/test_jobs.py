"""The data sets through the jobs: a step of training, evaluation, prediction, on tiny trees of the true formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.ade20k_panoptic import prepare_split
from pem_lightning.files import id_to_rgb
from tests.jobs import call

pytestmark = pytest.mark.slow

TINY = (
    "recipe.global_batch_size=2",
    "recipe.max_steps=1",
    "recipe.val_interval=1",
    "recipe.num_points=64",
    "recipe.train_transform.crop_size=[48,48]",
    "recipe.train_transform.shortest_edges=[48]",
    "recipe.eval_transform.shortest_edge=48",
    "backbone=resnet18",
    "network.num_layers=1",
    "network.num_queries=10",
    "network.hidden_channels=64",
    "task.inference.object_mask_threshold=0.0",
    "dataset.num_workers=0",
    "trainer=cpu",
    "callbacks.panels=null",
    "callbacks.curves=null",
    "hydra.run.dir=run",
)


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def photograph(height: int = 41, width: int = 57) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def halves(left: int, right: int, height: int = 41, width: int = 57) -> np.ndarray:
    values = np.full((height, width), left, np.int32)
    values[:, width // 2 :] = right
    return values


def trained_metrics(folder: Path) -> dict:
    return json.loads((folder / "run" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def ade20k(tmp_path_factory):
    root = tmp_path_factory.mktemp("ADEChallengeData2016")
    for split in ("training", "validation"):
        instances = np.zeros((41, 57, 3), np.uint8)
        instances[5:20, 5:20] = (4, 1, 0)  # a person
        for name in ("a", "b"):
            save(root / "images" / split / f"{name}.jpg", photograph())
            save(root / "annotations" / split / f"{name}.png", halves(1, 3).astype(np.uint8))
            save(root / "annotations_instance" / split / f"{name}.png", instances)
    return root


@pytest.mark.parametrize("task", ["semantic", "panoptic"])
def test_ade20k(ade20k, task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ("dataset=ade20k", f"task={task}", f"dataset.root={ade20k}")
    if task == "panoptic":
        assert call("train", *arguments, *TINY) == 2
        assert f"run `python scripts/prepare_ade20k.py {ade20k}`" in capsys.readouterr().err
        for split in ("train", "val"):
            prepare_split(ade20k, split, 0)
    assert call("train", *arguments, *TINY) == 0
    metrics = trained_metrics(tmp_path)
    assert len(metrics["per_class"]) == 150
    assert ("val/PQ" in metrics) == (task == "panoptic")
    assert call("evaluate", "checkpoint=run/checkpoints/best.ckpt", "hydra.run.dir=again") == 0
    assert json.loads(Path("again/metrics.json").read_text())["per_class"] == metrics["per_class"]


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_coco_panoptic(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    segments = [{"id": 1, "category_id": 30, "iscrowd": 0}, {"id": 70_000, "category_id": 7, "iscrowd": 1}]
    content = {
        "images": [{"id": name, "file_name": f"{name}.jpg"} for name in "ab"],
        "annotations": [{"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in "ab"],
        "categories": [{"id": 30, "name": "sky", "isthing": 0}, {"id": 7, "name": "kite", "isthing": 1}],
    }
    for name in "ab":
        save(Path(f"photos/{name}.jpg"), photograph())
        save(Path(f"maps/{name}.png"), id_to_rgb(halves(1, 70_000)))
    Path("panoptic.json").write_text(json.dumps(content))
    keys = [
        f"dataset.{split}_{key}"
        for split in ("train", "val")
        for key in ("json=panoptic.json", "maps=maps", "images=photos")
    ]
    assert call("train", "dataset=coco_panoptic", f"task={task}", "dataset.root=.", *keys, *TINY) == 0
    assert [row["class"] for row in trained_metrics(tmp_path)["per_class"]] == ["sky", "kite"]
    assert call("evaluate", "checkpoint=run/checkpoints/best.ckpt", "hydra.run.dir=again") == 0


def test_semantic_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "val/a"):
        save(Path(f"images/{name}.jpg"), photograph())
        save(Path(f"labels/{name}.png"), halves(1, 255).astype(np.uint8))
    Path("classes.yaml").write_text("[road, car, tree]")
    assert call("train", "dataset=semantic_folder", "dataset.root=.", *TINY) == 2
    assert "dataset=semantic_folder has no task=panoptic: choose task=semantic" in capsys.readouterr().err
    assert call("train", "dataset=semantic_folder", "task=semantic", "dataset.root=.", *TINY) == 0
    assert [row["class"] for row in trained_metrics(tmp_path)["per_class"]] == ["road", "car", "tree"]
    assert call("evaluate", "checkpoint=run/checkpoints/best.ckpt", "hydra.run.dir=again") == 0
    # Prediction needs the checkpoint only.
    shutil.rmtree("labels")
    Path("classes.yaml").unlink()
    assert call("predict", "checkpoint=run/checkpoints/best.ckpt", "input=images/val", "output=out") == 0
    assert set(np.unique(np.array(Image.open("out/a_semantic.png")))) <= {0, 1, 2}


def test_cityscapes_test_split_is_predicted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train/ulm/ulm_0_0", "train/ulm/ulm_1_0", "val/ulm/ulm_2_0"):
        save(Path(f"leftImg8bit/{name}_leftImg8bit.png"), photograph())
        save(Path(f"gtFine/{name}_gtFine_instanceIds.png"), halves(7, 26001).astype(np.uint16))
    for city in ("berlin", "bonn"):
        save(Path(f"leftImg8bit/test/{city}/{city}_0_0_leftImg8bit.png"), photograph())
    assert call("train", "dataset=cityscapes", "dataset.root=.", *TINY) == 0
    pattern = "input='leftImg8bit/test/**/*.png'"
    assert call("predict", "checkpoint=run/checkpoints/best.ckpt", pattern, "output=out") == 0
    found = {image["id"] for image in json.loads(Path("out/panoptic.json").read_text())["images"]}
    assert found == {"berlin_0_0_leftImg8bit", "bonn_0_0_leftImg8bit"}
