"""The data sets through the jobs: a step of training, evaluation, prediction, on tiny trees of the true formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data import check
from pem_lightning.files import id_to_rgb
from pem_lightning.tools.prepare_ade20k import prepare_split
from tests.data.damage import save
from tests.jobs import call

pytestmark = pytest.mark.slow

TINY = (
    "recipe.global_batch_size=2",
    "recipe.max_steps=1",
    "recipe.val_interval=1",
    "recipe.num_points=64",
    "recipe.train_transform.crop_size=[32,32]",
    "recipe.train_transform.shortest_edges=[32]",
    "recipe.eval_transform.shortest_edge=32",
    "backbone.module={_target_:tests.models.randomize.TinyBackbone}",
    "weights=null",
    "network.num_layers=1",
    "network.num_queries=10",
    "network.hidden_channels=64",
    "task.inference.object_mask_threshold=0.0",
    "dataset.num_workers=0",
    "trainer=cpu",
    "callbacks.panels=null",
    "callbacks.curves=null",
    "callbacks.confusion=null",
    "hydra.run.dir=run",
)


PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8)


def halves(left: int, right: int) -> np.ndarray:
    values = np.full((41, 57), left, np.int32)
    values[:, 28:] = right
    return values


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains in a folder of its own and returns metrics.json."""
    monkeypatch.chdir(tmp_path)

    def train(*arguments):
        assert call("train", "dataset.root=.", *arguments, *TINY) == 0
        return json.loads(Path("run/metrics.json").read_text())

    return train


def test_ade20k_panoptic(trained, capsys):
    for split in ("training", "validation"):
        instances = np.zeros((41, 57, 3), np.uint8)
        instances[5:20, 5:20] = (4, 1, 0)  # a person
        for name in ("a", "b"):
            save(f"images/{split}/{name}.jpg", PHOTOGRAPH)
            save(f"annotations/{split}/{name}.png", halves(1, 3).astype(np.uint8))
            save(f"annotations_instance/{split}/{name}.png", instances)
    assert call("train", "dataset=ade20k", "dataset.root=.", *TINY) == 2
    assert "run `python scripts/prepare_ade20k.py .`" in capsys.readouterr().err
    for split in ("train", "val"):
        prepare_split(Path(), split)
    metrics = trained("dataset=ade20k")
    assert len(metrics["per_class"]) == 150
    assert "val/PQ" in metrics
    assert call("evaluate", "checkpoint=run/checkpoints/best.ckpt", "hydra.run.dir=again") == 0
    assert json.loads(Path("again/metrics.json").read_text())["per_class"] == metrics["per_class"]


def test_coco_panoptic_semantic(trained):
    segments = [{"id": 1, "category_id": 30, "iscrowd": 0}, {"id": 70_000, "category_id": 7, "iscrowd": 1}]
    content = {
        "images": [{"id": name, "file_name": f"{name}.jpg"} for name in "ab"],
        "annotations": [{"image_id": n, "file_name": f"{n}.png", "segments_info": segments} for n in "ab"],
        "categories": [{"id": 30, "name": "sky", "isthing": 0}, {"id": 7, "name": "kite", "isthing": 1}],
    }
    for name in "ab":
        save(f"photos/{name}.jpg", PHOTOGRAPH)
        save(f"maps/{name}.png", id_to_rgb(halves(1, 70_000)))
    Path("panoptic.json").write_text(json.dumps(content))
    files = ("json=panoptic.json", "maps=maps", "images=photos")
    keys = [f"dataset.{split}_{file}" for split in ("train", "val") for file in files]
    metrics = trained("dataset=coco_panoptic", "task=semantic", *keys)
    assert [row["class"] for row in metrics["per_class"]] == ["sky", "kite"]


@pytest.mark.parametrize("task", ["instance", "panoptic", "semantic"])
def test_coco_instances(trained, task):
    """In Roboflow's layout, with an image without objects; then all jobs and the cache."""
    polygon = [5, 5, 35, 5, 35, 30, 5, 30]
    content = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "height": 41, "width": 57} for i, n in enumerate("ab")],
        "annotations": [{"id": 1, "image_id": 0, "category_id": 3, "segmentation": [polygon], "iscrowd": 0}],
        "categories": [{"id": 3, "name": "kite", "supercategory": "kites"}],
    }
    for split in ("train", "valid"):
        for name in "ab":
            save(f"{split}/{name}.jpg", PHOTOGRAPH)
        Path(split, "_annotations.coco.json").write_text(json.dumps(content))
    places = {"train": "train", "val": "valid"}
    keys = [f"dataset.{split}_json={folder}/_annotations.coco.json" for split, folder in places.items()]
    keys += [f"dataset.{split}_images={folder}" for split, folder in places.items()]
    metrics = trained("dataset=coco_instances", f"task={task}", "dataset.cache=cache", *keys)
    expected = ["kite"] if task == "instance" else ["kite", "background"]
    assert [row["class"] for row in metrics["per_class"]] == expected
    assert call("evaluate", "checkpoint=run/checkpoints/best.ckpt", "hydra.run.dir=again", "dataset.cache=null") == 0
    assert json.loads(Path("again/metrics.json").read_text())["per_class"] == metrics["per_class"]


def test_semantic_folder(trained, capsys):
    for name in ("train/a", "train/b", "val/a"):
        save(f"images/{name}.jpg", PHOTOGRAPH)
        save(f"labels/{name}.png", halves(1, 2).astype(np.uint8))
    Path("classes.yaml").write_text("[road, car, tree]")
    assert call("train", "dataset=semantic_folder", "task=panoptic", "dataset.root=.", *TINY) == 2
    assert "dataset=semantic_folder has no task=panoptic: " in capsys.readouterr().err
    metrics = trained("dataset=semantic_folder")
    assert [row["class"] for row in metrics["per_class"]] == ["road", "car", "tree"]
    # Prediction needs the checkpoint only.
    shutil.rmtree("labels")
    Path("classes.yaml").unlink()
    assert call("predict", "checkpoint=run/checkpoints/best.ckpt", "input=images/val", "output=out") == 0
    assert set(np.unique(np.array(Image.open("out/a_semantic.png")))) <= {0, 1, 2}


def test_camvid_and_its_test_split(trained, capsys):
    """In SegNet's layout; `task=semantic` goes without saying."""
    for name in (f"{split}/{split}_{n}" for split in ("train", "val", "test") for n in "ab"):
        save(f"{name}.png", PHOTOGRAPH)
        save(f"{name.replace('/', 'annot/')}.png", halves(3, 11).astype(np.uint8))
    keys = ("dataset=camvid", "weights=null", "dataset.check=false")
    assert [row["class"] for row in trained(*keys)["per_class"]][:2] == ["sky", "building"]
    test = ("checkpoint=run/checkpoints/best.ckpt", "dataset.eval_split=test", "save_predictions=saved")
    assert call("evaluate", *test, "hydra.run.dir=tested") == 0
    assert sorted(path.name for path in Path("saved").rglob("*.png")) == ["test_a.png", "test_b.png"]
    capsys.readouterr()
    assert call("train", *keys, "dataset.root=.", "dataset.eval_split=test", *TINY) == 2
    assert "error: dataset.eval_split=test is for evaluate.py" in capsys.readouterr().err


def test_cityscapes_test_split_is_predicted(trained, capfd):
    for name in ("train/ulm/ulm_0_0", "train/ulm/ulm_1_0", "val/ulm/ulm_2_0"):
        save(f"leftImg8bit/{name}_leftImg8bit.png", PHOTOGRAPH)
        save(f"gtFine/{name}_gtFine_instanceIds.png", halves(7, 26001).astype(np.uint16))
    for city in ("berlin", "bonn"):
        save(f"leftImg8bit/test/{city}/{city}_0_0_leftImg8bit.png", PHOTOGRAPH)
    trained("dataset=cityscapes")
    pattern = "input='leftImg8bit/test/**/*.png'"
    assert call("predict", "checkpoint=run/checkpoints/best.ckpt", pattern, "output=out") == 0
    found = {image["id"] for image in json.loads(Path("out/panoptic.json").read_text())["images"]}
    assert found == {"berlin_0_0_leftImg8bit", "bonn_0_0_leftImg8bit"}
    # A broken file found by a loading process stops training with its name and the cure.
    path = Path("leftImg8bit/train/ulm/ulm_1_0_leftImg8bit.png")
    path.write_bytes(path.read_bytes()[:-100])
    capfd.readouterr()
    assert call("train", "dataset=cityscapes", "dataset.root=.", *TINY, "dataset.num_workers=1") == 2
    printed = capfd.readouterr()
    (error,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert str(path) in error
    assert "unzip" in error
    assert "Traceback" not in printed.err + printed.out


def test_a_training_checks_its_data_first(tmp_path, monkeypatch, capsys):
    """Masks of 0 and 255 are refused before the first step; turned images and too few queries are said, once."""
    monkeypatch.chdir(tmp_path)
    for name in ("train/a", "train/b", "val/a"):
        save(f"images/{name}.jpg", PHOTOGRAPH)
        save(f"labels/{name}.png", halves(0, 255).astype(np.uint8))
    Path("classes.yaml").write_text("[background, crack]")
    arguments = ("dataset=semantic_folder", "dataset.root=.", *TINY, "recipe.checkpoint_interval=1")
    assert call("train", *arguments) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "write {name: crack, id: 255} in classes.yaml" in error
    assert not Path("run/checkpoints").exists()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(PHOTOGRAPH).save("images/train/a.jpg", exif=exif)
    Path("classes.yaml").write_text("[background, {name: crack, id: 255}]")
    monkeypatch.setattr(check, "SAMPLE", {"train": (64, 1000.0), "val": (16, 1000.0)})
    assert call("train", *arguments, "network.num_queries=1") == 0
    log = Path("run/run.log").read_text()
    for finding in ("1 image(s) are turned upright by their EXIF", "more segments than num_queries=1, up to 2"):
        assert finding in log
    Path("run/run.log").unlink()
    assert call("train", "resume=run/checkpoints/last.ckpt", "recipe.max_steps=2") == 0
    assert "EXIF" not in Path("run/run.log").read_text()
