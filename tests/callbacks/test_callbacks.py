"""What a run shows and leaves behind, each piece by itself."""

import json
import math
from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer
from PIL import Image
from rich.console import Console

from pem_lightning.callbacks import Results, progress_bar
from pem_lightning.callbacks.curves import draw_curves, read_metrics
from pem_lightning.callbacks.loggers import wandb_logger
from pem_lightning.callbacks.progress import LiveProgress, ProgressLines
from pem_lightning.callbacks.results import class_table, summary
from pem_lightning.evaluation import Evaluator
from pem_lightning.inference.postprocess import Instance
from pem_lightning.inference.task import Result
from pem_lightning.types import Batch


def fake_trainer(**attributes):
    return Mock(spec=Trainer, **attributes)


@pytest.fixture
def evaluation(sample, result, info):
    evaluator = Evaluator(info, "panoptic")
    evaluator.update(result, sample)
    return evaluator.compute()


def test_table_and_summary(evaluation, info):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(class_table(evaluation, info))
    text = console.export_text()
    assert "person" in text
    assert "100.0" in text
    train = next(line for line in text.splitlines() if "train" in line)
    assert train.count(" - ") == 4  # PQ, SQ, RQ, IoU of a class that does not occur
    assert "PQ 100.0" in summary(evaluation)
    assert "mIoU 100.0" in summary(evaluation)


def test_summary_and_rows_of_the_instance_task(sample, info):
    evaluator = Evaluator(info, "instance")
    evaluator.update(Result(instances=(Instance(sample.panoptic == 1, 0, 0.9),)), sample)
    evaluation = evaluator.compute()
    assert summary(evaluation).splitlines()[0].split() == ["objects", "AP", "100.0", "AP50", "100.0", "AP75", "100.0"]
    assert "large        AP -" in summary(evaluation)
    assert [row["class"] for row in evaluation.per_class(info)] == ["person", "train"]  # things only
    assert class_table(evaluation, info).row_count == 2
    assert list(evaluation.scalars()) == ["val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl"]


def test_results_are_written_without_nan(tmp_path, evaluation, module, capsys):
    module.evaluation = evaluation
    Results(tmp_path).on_fit_end(fake_trainer(global_step=7), module)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["step"] == 7
    assert metrics["val/PQ"] == 100
    assert metrics["per_class"][2]["IoU"] is None
    assert (tmp_path / "per_class.csv").read_text().splitlines()[0] == "class,kind,PQ,SQ,RQ,TP,FP,FN,IoU"
    assert "numbers" in capsys.readouterr().out
    module.evaluation = None
    Results(tmp_path / "never").on_fit_end(fake_trainer(), module)
    assert not (tmp_path / "never").exists()


def test_curves_join_the_logs_of_a_resumed_run(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/PQ\n0,0,3.0,\n0,1,2.0,\n0,1,,10.0\n")
    second.write_text("epoch,step,train/loss\n0,1,1.5\n0,2,1.0\n")
    series = read_metrics([first, tmp_path / "missing.csv", second])
    assert series == {"train/loss": [(1, 3.0), (2, 1.5), (3, 1.0)], "val/PQ": [(2, 10.0)]}
    draw_curves(series, tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == (1320, 480)
    draw_curves({}, tmp_path / "empty.png")


def test_progress_is_lines_where_there_is_no_terminal(module, capsys):
    bar = progress_bar("val/PQ")
    assert isinstance(bar, ProgressLines)
    trainer = fake_trainer(
        global_step=4,
        max_steps=4,
        world_size=1,
        callback_metrics={"train/loss": torch.tensor(2.5), "val/PQ": torch.tensor(60.0)},
    )
    bar.on_train_start(trainer, module)
    trainer.global_step = 3
    bar.on_train_batch_end(trainer, module, None, Batch([torch.zeros(3, 1, 1)] * 2, [], []), 0)
    assert capsys.readouterr().out == ""  # not due yet
    trainer.global_step = 4
    bar.on_train_batch_end(trainer, module, None, Batch([torch.zeros(3, 1, 1)] * 2, [], []), 0)
    line = capsys.readouterr().out
    assert line.startswith("step 4/4  loss 2.50  PQ 60.0")
    assert "images/s" in line
    bar.disable()
    bar.on_validation_end(trainer, module)
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


def test_evaluation_names_and_percent(evaluation, info):
    scalars = evaluation.scalars()
    assert scalars["val/PQ_things"] == scalars["val/mIoU"] == 100
    assert len(scalars) == 11
    assert math.isnan(evaluation.per_class(info)[2]["PQ"])


def test_progress_is_a_live_bar_on_a_terminal(module, monkeypatch):
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
    batch = Batch([torch.zeros(3, 1, 1)] * 2, [], [])
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
