"""What a run leaves with its trackers, read back from their files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.jobs import TINY, call
from tests.wandb_files import OfflineRun

pytestmark = pytest.mark.slow

LENGTH = ("recipe.max_steps=4", "recipe.val_interval=2", "recipe.checkpoint_interval=2")
LOSSES = {f"train/loss_{part}{layer}" for part in ("ce", "mask", "dice") for layer in ("", "_0", "_1")}
QUALITY = {f"val/{name}{group}" for name in ("PQ", "SQ", "RQ") for group in ("", "_things", "_stuff")} | {"val/mIoU"}
LOGGED = {
    "train/loss",
    "train/grad_norm",
    *LOSSES,
    *QUALITY,
    "lr/network",
    "train/images_per_second",
    "train/data_wait_percent",
}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Folder of a run of four steps that went on to six, and what it printed."""
    folder = tmp_path_factory.mktemp("tracked")
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_API_KEY", raising=False)
        assert call("train", *TINY, *LENGTH, "logger=wandb", "hydra.run.dir=run") == 0
        wandb.finish()  # as the end of the process does
        longer = ("resume=run/checkpoints/last.ckpt", "recipe.max_steps=6")
        assert call("train", *TINY, *LENGTH[1:], *longer, "logger=wandb") == 0
        wandb.finish()
    yield folder / "run"
    os.chdir(before)


@pytest.fixture(scope="module")
def offline(tracked):
    """The parts of the run in Weights & Biases' files."""
    folders = sorted(tracked.glob("wandb/offline-run-*"), key=lambda folder: folder.name)
    return [OfflineRun(folder) for folder in folders]


@pytest.fixture(scope="module")
def events(tracked):
    """The run in TensorBoard's files."""
    accumulator = EventAccumulator(str(tracked), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_weights_and_biases_have_every_number(offline):
    first, second = offline
    for run, steps in ((first, 4), (second, 2)):
        keys = {key for row in run.history for key in row}
        assert keys >= LOGGED
        assert len(run.values("train/loss")) == len(run.values("lr/network")) == steps  # logged at every step
        assert len(run.values("val/PQ")) == steps / 2
    assert [row["trainer/global_step"] for row in first.history if "val/PQ" in row] == [2, 4]
    assert [row["trainer/global_step"] for row in second.history if "train/loss" in row] == [5, 6]
    assert first.metrics["val/*"].summary.max
    assert first.metrics["val/*"].step_metric == "trainer/global_step"


def test_a_resumed_run_is_the_same_in_weights_and_biases(offline):
    first, second = offline
    assert first.id == second.id
    assert first.folder != second.folder


def test_weights_and_biases_have_configuration_and_code(offline):
    config = offline[0].config
    assert config["network.num_queries"] == 20
    assert config["recipe.optimizer.lr"] == 1e-3
    assert "recipe.max_steps=4" in config["overrides"]
    (code,) = (artifact for artifact in offline[0].artifacts if artifact.type == "code")
    assert {"module.py", "losses/matcher.py"} <= {entry.path for entry in code.manifest.contents}


def test_weights_and_biases_have_tables_of_every_validation(offline):
    paths = offline[0].values("val/per_class/path")
    assert len(paths) == 2
    table = json.loads((offline[0].folder / "files" / paths[-1]).read_text(), parse_constant=pytest.fail)
    assert table["columns"][:3] == ["class", "kind", "PQ"]
    assert len(table["data"]) == 19
    assert len(offline[0].values("val/confusion/path")) == 2


def test_weights_and_biases_have_predictions_with_masks(offline):
    run, panel = offline[0], "panels/synthetic_000000_000000"
    files = run.folder / "files"
    assert len(run.values(f"{panel}/path")) == 2
    assert Image.open(files / run.values(f"{panel}/path")[-1]).size == (128, 64)
    masks = {}
    for name in ("ground_truth", "prediction", "ground_truth_segments"):
        masks[name] = np.array(Image.open(files / run.values(f"{panel}/masks/{name}/path")[-1]))
        assert masks[name].shape == (64, 128)
    assert masks["ground_truth"].max() <= 19  # 0 is none of the 19 classes
    pairs = set(zip(masks["ground_truth"].ravel(), masks["ground_truth_segments"].ravel(), strict=True))
    assert len(pairs) == len(np.unique(masks["ground_truth_segments"]))  # a segment has one class
    labels = run.config["_wandb"]["mask/class_labels"][f"{panel}_wandb_delimeter_prediction"]["value"]
    assert (labels["0"], labels["1"], labels["14"]) == ("(none)", "road", "car")
    boxes = json.loads((files / run.values(f"{panel}/boxes/ground_truth/path")[-1]).read_text())["box_data"]
    assert {box["box_caption"] for box in boxes} <= {"person", "rider", "car", "truck", "bus", "bicycle", "motorcycle"}


def test_tensorboard_and_the_csv_file_have_the_same_names(events, tracked):
    with (tracked / "csv" / "metrics.csv").open() as file:
        names = set(next(csv.reader(file))) - {"epoch", "step"}
    assert set(events.Tags()["scalars"]) == names >= LOGGED
    assert [event.step for event in events.Scalars("val/PQ")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("train/loss_ce_0")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in events.Images("val/confusion")] == [2, 4, 6]
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("panels/")]) == 3
    assert len(events.Tensors("val/per_class/text_summary")) == 3


def test_the_wandb_package_is_not_imported_before_it_is_used():
    script = "import sys, pem_lightning.cli.main; sys.exit('wandb' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", script], cwd=root, check=False).returncode == 0
