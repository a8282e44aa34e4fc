"""What a run leaves with its loggers, read back from their files."""

import csv
import json

import numpy as np
import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.callbacks.wandb_files import OfflineRun
from tests.jobs import TINY, call

pytestmark = pytest.mark.slow

SMALL = (
    *TINY,
    "dataset.datamodule.num_train=4",
    "dataset.datamodule.num_val=1",
    "recipe.val_interval=1",
    "logger=wandb",
)
LOSSES = {f"train/loss_{part}{layer}" for part in ("ce", "mask", "dice") for layer in ("", "_0", "_1")}
QUALITY = {f"val/{name}{group}" for name in ("PQ", "SQ", "RQ") for group in ("", "_things", "_stuff")} | {"val/mIoU"}
LOGGED = {"train/loss", "train/grad_norm", "train/images_per_second", "lr/network", *LOSSES, *QUALITY}


@pytest.fixture(scope="module")
def tracked(work):
    """Folder of a run of one step that was resumed for a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.delenv("WANDB_API_KEY", raising=False)
        assert call("train", *SMALL, "recipe.max_steps=1", "hydra.run.dir=run") == 0
        wandb.finish()  # as the end of the process does
        assert call("train", *SMALL, "recipe.max_steps=2", "resume=run/checkpoints/last.ckpt") == 0
        wandb.finish()
    return work / "run"


@pytest.fixture(scope="module")
def offline(tracked):
    """The parts of the run in Weights & Biases' files."""
    return [OfflineRun(folder) for folder in sorted(tracked.glob("wandb/offline-run-*"))]


def test_weights_and_biases_have_every_number(offline):
    first, second = offline
    for run, step in ((first, 0), (second, 1)):
        assert {key for row in run.history for key in row} >= LOGGED
        for name in ("train/loss", "lr/network", "val/PQ"):
            assert [row["trainer/global_step"] for row in run.history if name in row] == [step]
    assert first.metrics["val/*"].summary.max
    assert first.metrics["val/*"].step_metric == "trainer/global_step"
    assert first.id == second.id
    assert first.folder != second.folder


def test_weights_and_biases_have_configuration_and_code(offline):
    config = offline[0].config
    assert config["network"]["num_queries"] == 20
    assert config["recipe"]["optimizer"]["lr"] == 1e-3
    (code,) = (artifact for artifact in offline[0].artifacts if artifact.type == "code")
    assert {"training/module.py", "losses/matcher.py"} <= {entry.path for entry in code.manifest.contents}


def test_weights_and_biases_have_tables_and_pictures_of_every_validation(offline):
    run = offline[0]
    files = run.folder / "files"
    (path,) = run.values("val/per_class/path")
    table = json.loads((files / path).read_text(), parse_constant=pytest.fail)
    assert table["columns"][:3] == ["class", "kind", "PQ"]
    assert len(table["data"]) == 19
    assert len(run.values("val/confusion/filenames")) == 1
    panel = "panels/synthetic_000000_000000"
    (path,) = run.values(f"{panel}/filenames")[-1]
    assert Image.open(files / path).size == (128, 64)
    (masks,) = run.values(f"{panel}/all_masks")[-1]
    assert set(masks) == {"truth", "truth_segments", "prediction", "prediction_segments"}
    truth, segments = (np.array(Image.open(files / masks[name]["path"])) for name in ("truth", "truth_segments"))
    assert truth.shape == (64, 128)
    assert truth.max() <= 19  # 0 is none of the 19 classes
    pairs = set(zip(truth.ravel(), segments.ravel(), strict=True))
    assert len(pairs) == len(np.unique(segments))  # a segment has one class


def test_tensorboard_and_the_csv_file_have_the_same_names(tracked):
    events = EventAccumulator(str(tracked), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    with (tracked / "csv" / "metrics.csv").open() as file:
        names = set(next(csv.reader(file))) - {"step"}
    assert set(events.Tags()["scalars"]) - {"best/val/PQ"} == names >= LOGGED
    for name in ("val/PQ", "train/loss_ce_0"):
        assert [event.step for event in events.Scalars(name)] == [0, 1]
    assert [event.step for event in events.Images("val/confusion")] == [0, 1]
    assert len([tag for tag in events.Tags()["images"] if tag.startswith("panels/")]) == 1
    assert "_hparams_/session_start_info" in events.summary_metadata
