"""What a run shows and leaves behind, each piece by itself."""

import json
import math
from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer
from PIL import Image
from rich.console import Console

from pem_lightning.callbacks import Results, Throughput
from pem_lightning.callbacks.results import class_table, summary
from pem_lightning.callbacks.visualization import draw_curves, read_metrics
from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.metrics.evaluator import Evaluator


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


def fitting(step, **attributes):
    return Mock(
        spec=Trainer, global_step=step, max_steps=10, callbacks=[], loggers=[], state=Mock(fn="fit"), **attributes
    )


def test_results_are_written_without_nan(tmp_path, evaluation, module, capsys):
    module.evaluation, module.record = evaluation, {}
    Results(tmp_path, "val/PQ").on_fit_end(fitting(7), module)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["step"] == 7
    assert metrics["val/PQ"] == 100
    assert metrics["per_class"][2]["IoU"] is None
    assert (tmp_path / "per_class.csv").read_text().splitlines()[0] == "class,kind,PQ,SQ,RQ,TP,FP,FN,IoU"
    assert "numbers" in capsys.readouterr().out
    module.evaluation = None  # stopped before the first validation
    Results(tmp_path / "never", "val/PQ").on_fit_end(fitting(7), module)
    assert not (tmp_path / "never").exists()


def test_the_end_says_how_it_went_and_how_to_go_on(tmp_path, evaluation, module, capsys):
    module.evaluation = evaluation
    module.record = {"overrides": ["task=panoptic", "recipe.max_steps=10", "resume=old"]}
    first = Results(tmp_path, "val/PQ")
    for step, quality in ((2, 40.0), (4, 60.0), (6, 50.0)):
        first.on_validation_end(fitting(step, callback_metrics={"val/PQ": torch.tensor(quality)}), module)
    resumed = Results(tmp_path, "val/PQ")
    resumed.load_state_dict(first.state_dict())
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "last"):
        (tmp_path / "checkpoints" / f"{name}.ckpt").touch()
    measured = Throughput()
    measured.watch.step(20)
    trainer = fitting(7)
    trainer.callbacks = [measured]
    resumed.on_fit_end(trainer, module)
    said = capsys.readouterr().out
    assert "best         PQ 60.0 at step 4" in said
    assert "0:00:00 for 1 steps, of which validation 0:00:00" in said
    assert "images/s" in said
    folder = tmp_path / "checkpoints"
    assert f"go on        python train.py task=panoptic recipe.max_steps=10 resume={folder}/last.ckpt\n" in said
    assert f"python evaluate.py checkpoint={folder}/best.ckpt\n" in said
    assert f"python predict.py checkpoint={folder}/best.ckpt input=IMAGE\n" in said
    trainer.global_step = 10
    resumed.on_fit_end(trainer, module)
    longer = f"train longer python train.py task=panoptic recipe.max_steps=20 resume={folder}/last.ckpt\n"
    assert longer in capsys.readouterr().out


def test_curves_join_the_logs_of_a_resumed_run(tmp_path):
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("epoch,step,train/loss,val/PQ\n0,0,3.0,\n0,1,2.0,\n0,1,,10.0\n")
    second.write_text("epoch,step,train/loss\n0,1,1.5\n0,2,1.0\n")
    series = read_metrics([first, tmp_path / "missing.csv", second])
    assert series == {"train/loss": [(1, 3.0), (2, 1.5), (3, 1.0)], "val/PQ": [(2, 10.0)]}
    draw_curves(series, tmp_path / "deep" / "curves.png")
    assert Image.open(tmp_path / "deep" / "curves.png").size == (1320, 480)
    draw_curves({}, tmp_path / "empty.png")


def test_evaluation_names_and_percent(evaluation, info):
    scalars = evaluation.scalars()
    assert scalars["val/PQ_things"] == scalars["val/mIoU"] == 100
    assert len(scalars) == 11
    assert math.isnan(evaluation.per_class(info)[2]["PQ"])
