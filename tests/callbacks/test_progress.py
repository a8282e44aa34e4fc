from unittest.mock import Mock, PropertyMock

import pytest
import torch
from lightning import Trainer

from pem_lightning.callbacks import progress, progress_bar
from pem_lightning.callbacks import progress as stopwatch
from pem_lightning.callbacks.progress import LiveProgress, ProgressLines
from pem_lightning.types import Batch

BATCH = Batch([torch.zeros(3, 1, 1)] * 2, [], [])
METRICS = {
    "train/loss": torch.tensor(20.5),
    "train/loss_ce": torch.tensor(1.5),
    "train/loss_mask": torch.tensor(0.25),
    "train/loss_dice": torch.tensor(2.0),
    "train/data_wait_percent": torch.tensor(12.0),
    "val/PQ": torch.tensor(60.0),
}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopwatch.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def trainer():
    return Mock(
        spec=Trainer,
        global_step=0,
        max_steps=8,
        world_size=1,
        val_check_interval=4,
        num_val_batches=[2],
        log_every_n_steps=2,
        callback_metrics=METRICS,
        strategy=Mock(root_device=torch.device("cpu")),
    )


def step(bar, trainer, module, clock, seconds):
    bar.on_train_batch_start(trainer, module, BATCH, 0)
    clock[0] += seconds
    trainer.global_step += 1
    bar.on_train_batch_end(trainer, module, None, BATCH, 0)


def validate(bar, trainer, module, clock, seconds):
    bar.on_validation_start(trainer, module)
    clock[0] += seconds
    bar.on_validation_end(trainer, module)


def test_lines_where_there_is_no_terminal(module, trainer, clock, capsys):
    bar = progress_bar("val/PQ")
    assert isinstance(bar, ProgressLines)
    bar.on_train_start(trainer, module)
    step(bar, trainer, module, clock, 10)
    assert capsys.readouterr().out == ""  # not due yet
    step(bar, trainer, module, clock, 10)
    losses = "loss 20.50 (last layer: class 1.50, mask 0.25, dice 2.00)"
    rest = "PQ 60.0  0.2 images/s  12 % waiting for data"
    assert capsys.readouterr().out == f"step 2/8  {losses}  {rest}  at least 0:01:00 to go\n"
    trainer.global_step = 3
    step(bar, trainer, module, clock, 5)
    validate(bar, trainer, module, clock, 100)
    assert capsys.readouterr().out == "step 4  PQ 60.00\n"
    step(bar, trainer, module, clock, 15)
    # three steps of 10 seconds and the validation after the last step
    assert capsys.readouterr().out.endswith("  0:02:10 to go\n")
    bar.disable()
    step(bar, trainer, module, clock, 100)
    validate(bar, trainer, module, clock, 100)
    assert capsys.readouterr().out == ""


def test_no_value_is_read_from_a_gpu_between_logging_steps(module, trainer, clock):
    trainer.strategy.root_device = torch.device("cuda", 0)
    reads = PropertyMock(return_value=METRICS)
    type(trainer).callback_metrics = reads
    bar = ProgressLines("val/PQ")
    bar.on_train_start(trainer, module)
    counts = []
    for _ in range(4):
        step(bar, trainer, module, clock, 20)
        counts.append(reads.call_count)
    assert counts == [0, 1, 1, 2]


def test_a_live_bar_on_a_terminal(module, trainer, clock, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = progress_bar("val/PQ")
    assert isinstance(bar, LiveProgress)
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    step(bar, trainer, module, clock, 1)
    (training,) = bar._bars.tasks
    assert (training.completed, training.total) == (1, 8)
    assert training.description == "step 1/8  at least 0:00:07 to go"
    assert bar._bars._numbers.parts[0].startswith("loss 20.50")
    bar.on_validation_start(trainer, module)
    bar.on_validation_batch_end(trainer, module, None, BATCH, 0)
    assert [task.completed for task in bar._bars.tasks] == [1, 1]
    bar.on_validation_end(trainer, module)
    assert len(bar._bars.tasks) == 1
    bar.on_fit_end(trainer, module)
    assert not bar._bars.live.is_started


@pytest.mark.parametrize(("width", "lines"), [(200, 1), (60, 2), (20, 4)])
def test_numbers_break_between_parts_on_narrow_terminals(width, lines):
    parts = ["loss 20.50 (last layer: class 1.50)", "PQ 60.0", "0.2 images/s", "12 % waiting for data"]
    found = progress._wrapped(parts, width).plain.split("\n")
    assert "  ".join(found) == "  ".join(parts)
    assert len(found) == lines
    assert all(len(line) <= width or line in parts for line in found)
