"""What a run shows and leaves behind, each piece by itself."""

import json
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning import Trainer
from PIL import Image
from rich.console import Console

from pem_lightning.callbacks import Results, progress_bar
from pem_lightning.callbacks.curves import draw_curves, read_metrics
from pem_lightning.callbacks.loggers import wandb_logger
from pem_lightning.callbacks.panels import PredictionPanels, draw_panel
from pem_lightning.callbacks.progress import LiveProgress, ProgressLines
from pem_lightning.callbacks.results import class_table, summary
from pem_lightning.evaluation import Evaluator
from pem_lightning.inference.task import Result
from pem_lightning.module import PEMModule
from pem_lightning.types import Batch, ClassInfo, DatasetInfo, Sample, Segment

INFO = DatasetInfo(
    "toy",
    (
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("sky", (70, 130, 180), False, 23),
        ClassInfo("train", (0, 80, 100), True, 31),
    ),
)


def fake_trainer(**attributes):
    return Mock(spec=Trainer, **attributes)


def fake_module(**attributes):
    return Mock(spec=PEMModule, info=INFO, **attributes)


@pytest.fixture
def sample():
    """Left half a person, right half sky."""
    ids = torch.ones(20, 30, dtype=torch.int32)
    ids[:, 15:] = 2
    return Sample(torch.zeros(3, 20, 30, dtype=torch.uint8), ids, (Segment(1, 0, True), Segment(2, 1, False)), "a")


@pytest.fixture
def result(sample):
    return Result((sample.panoptic - 1).long(), sample.panoptic, sample.segments)


@pytest.fixture
def evaluation(sample, result):
    evaluator = Evaluator(INFO, "panoptic")
    evaluator.update(result, sample)
    return evaluator.compute()


def test_table_and_summary(evaluation):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(class_table(evaluation, INFO))
    text = console.export_text()
    assert "person" in text
    assert "100.0" in text
    train = next(line for line in text.splitlines() if "train" in line)
    assert train.count(" - ") == 4  # PQ, SQ, RQ, IoU of a class that does not occur
    assert "PQ 100.0" in summary(evaluation)
    assert "mIoU 100.0" in summary(evaluation)


def test_results_are_written_without_nan(tmp_path, evaluation, capsys):
    module = fake_module(evaluation=evaluation)
    Results(tmp_path).on_fit_end(fake_trainer(global_step=7), module)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["step"] == 7
    assert metrics["val/PQ"] == 100
    assert metrics["per_class"][2]["IoU"] is None
    assert (tmp_path / "per_class.csv").read_text().splitlines()[0] == "class,kind,PQ,SQ,RQ,TP,FP,FN,IoU"
    assert "numbers" in capsys.readouterr().out
    Results(tmp_path / "never").on_fit_end(fake_trainer(), fake_module(evaluation=None))
    assert not (tmp_path / "never").exists()


def test_panel_is_legible_and_shows_three_pictures(sample, result):
    panel = draw_panel(sample, result, INFO)
    assert panel.dtype == np.uint8
    assert panel.shape[0] > 256
    assert panel.shape[1] >= 3 * 390
    semantic = draw_panel(sample, Result(result.semantic), INFO)
    assert semantic.shape == panel.shape


def test_panel_of_a_resized_image(sample, result):
    """Evaluation may resize the image and not the annotation."""
    small = sample._replace(image=torch.zeros(3, 10, 15, dtype=torch.uint8))
    assert draw_panel(small, result, INFO).shape == draw_panel(sample, result, INFO).shape


def test_panels_of_the_first_images_only(tmp_path, sample, result):
    callback = PredictionPanels(tmp_path, num_images=3)
    module, trainer = fake_module(), fake_trainer(global_step=5)
    for batch_idx in range(2):
        samples = [sample._replace(name=f"{batch_idx}{i}") for i in range(2)]
        batch = Batch([s.image for s in samples], [], samples)
        callback.on_validation_batch_end(trainer, module, {"results": [result, result]}, batch, batch_idx)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step_000005_00.png", "step_000005_01.png", "step_000005_10.png"]


def test_curves_join_the_logs_of_a_resumed_run(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/PQ\n0,0,3.0,\n0,1,2.0,\n0,1,,10.0\n")
    second.write_text("epoch,step,train/loss\n0,1,1.5\n0,2,1.0\n")
    series = read_metrics([first, tmp_path / "missing.csv", second])
    assert series == {"train/loss": [(1, 3.0), (2, 1.5), (3, 1.0)], "val/PQ": [(2, 10.0)]}
    draw_curves(series, tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == (1320, 480)
    draw_curves({}, tmp_path / "empty.png")


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    bar = progress_bar("val/PQ")
    assert isinstance(bar, ProgressLines)
    trainer = fake_trainer(
        global_step=4,
        max_steps=4,
        world_size=1,
        callback_metrics={"train/loss": torch.tensor(2.5), "val/PQ": torch.tensor(60.0)},
    )
    bar.on_train_start(trainer, fake_module())
    trainer.global_step = 3
    bar.on_train_batch_end(trainer, fake_module(), None, Batch([torch.zeros(3, 1, 1)] * 2, [], []), 0)
    assert capsys.readouterr().out == ""  # not due yet
    trainer.global_step = 4
    bar.on_train_batch_end(trainer, fake_module(), None, Batch([torch.zeros(3, 1, 1)] * 2, [], []), 0)
    line = capsys.readouterr().out
    assert line.startswith("step 4/4  loss 2.50  PQ 60.0")
    assert "images/s" in line
    bar.disable()
    bar.on_validation_end(trainer, fake_module())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("environment", "netrc", "offline"),
    [
        ({}, "", True),
        ({"WANDB_API_KEY": "k" * 40}, "", False),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", True),
        ({}, "machine api.wandb.ai login user password secret", False),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password secret", True),
    ],
)
def test_wandb_is_offline_unless_logged_in(environment, netrc, offline, tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logger = wandb_logger(tmp_path, project="toy")
    assert logger._offline is offline
    assert ("wandb sync" in caplog.text) == offline
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_evaluation_names_and_percent(evaluation):
    scalars = evaluation.scalars()
    assert scalars["val/PQ_things"] == scalars["val/mIoU"] == 100
    assert len(scalars) == 11
    assert math.isnan(evaluation.per_class(INFO)[2]["PQ"])


def test_progress_is_a_live_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = progress_bar("val/PQ")
    assert isinstance(bar, LiveProgress)
    trainer = fake_trainer(
        global_step=0,
        max_steps=4,
        world_size=1,
        num_val_batches=[2],
        callback_metrics={"train/loss": torch.tensor(2.5)},
    )
    module, batch = fake_module(), Batch([torch.zeros(3, 1, 1)] * 2, [], [])
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    trainer.global_step = 3
    bar.on_train_batch_end(trainer, module, None, batch, 0)
    (training,) = bar._bars.tasks
    assert (training.completed, training.total) == (3, 4)
    assert training.description.startswith("step 3/4  loss 2.50")
    bar.on_validation_start(trainer, module)
    bar.on_validation_batch_end(trainer, module, None, batch, 0)
    assert [task.completed for task in bar._bars.tasks] == [3, 1]
    bar.on_validation_end(trainer, module)
    assert len(bar._bars.tasks) == 1
    bar.on_fit_end(trainer, module)
    assert not bar._bars.live.is_started
