from unittest.mock import Mock, PropertyMock

import pytest
import torch
from torch import nn

from pem_lightning.callbacks import Throughput, progress, progress_bar
from pem_lightning.callbacks.progress import LiveProgress, PlainProgress
from pem_lightning.training.optim import parameter_groups
from pem_lightning.types import Batch

BATCH = Batch([torch.zeros(3, 1, 1)] * 2, [], [])
METRICS = {
    "train/loss": torch.tensor(20.5),
    "val/PQ": torch.tensor(60.0),
    "train/images_per_second": torch.tensor(0.25),
}


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def trainer(trainer):
    trainer.global_step, trainer.max_steps, trainer.callback_metrics = 0, 8, METRICS
    return trainer


def step(callback, trainer, module, clock, seconds):
    callback.on_train_batch_start(trainer, module, BATCH, 0)
    clock[0] += seconds
    trainer.global_step += 1
    callback.on_train_batch_end(trainer, module, None, BATCH, 0)


def test_lines_where_there_is_no_terminal(module, trainer, clock, capsys):
    bar = progress_bar("val/PQ")
    assert isinstance(bar, PlainProgress)
    bar.on_train_start(trainer, module)
    step(bar, trainer, module, clock, 10)
    assert capsys.readouterr().out == ""  # not a logging step
    step(bar, trainer, module, clock, 10)
    numbers = "loss 20.50  PQ 60.00  images/s 0.25"
    assert capsys.readouterr().out == f"step 2/8  {numbers}  0:01:00 to go\n"
    bar.on_validation_end(trainer, module)
    assert capsys.readouterr().out == "step 2  PQ 60.00\n"
    for _ in range(2):
        step(bar, trainer, module, clock, 5)
    assert capsys.readouterr().out == ""  # too early
    trainer.global_step = 7
    step(bar, trainer, module, clock, 1)
    assert capsys.readouterr().out == f"step 8/8  {numbers}\n"
    bar.disable()
    step(bar, trainer, module, clock, 100)
    bar.on_validation_end(trainer, module)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", [PlainProgress, LiveProgress])
def test_values_are_read_in_logging_steps_only(module, trainer, clock, kind):
    """Reading one waits for the GPU."""
    reads = PropertyMock(return_value=METRICS)
    type(trainer).callback_metrics = reads
    bar, counts = kind("val/PQ"), []
    trainer.progress_bar_callback = bar
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    for _ in range(4):
        step(bar, trainer, module, clock, 20)
        counts.append(reads.call_count)
    bar.teardown(trainer, module, "fit")
    assert counts == [0, 1, 1, 2]


def test_a_live_bar_on_a_terminal(module, trainer, clock, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = progress_bar("val/PQ")
    assert isinstance(bar, LiveProgress)
    trainer.progress_bar_callback = bar
    bar.setup(trainer, module, "fit")
    bar.on_train_start(trainer, module)
    for epoch in range(2):
        trainer.current_epoch = epoch
        bar.on_train_epoch_start(trainer, module)
        for _ in range(3):
            step(bar, trainer, module, clock, 1)
    (training,) = bar.progress.tasks
    assert (training.completed, training.total) == (6, 8)
    assert bar.get_metrics(trainer, module) == {"loss": 20.5, "PQ": 60.0, "images/s": 0.25}
    bar.on_fit_end(trainer, module)
    assert not bar.progress.live.is_started


def test_throughput_since_the_last_log_without_validation(trainer, module, clock, monkeypatch):
    trainer.loggers, trainer.world_size = [Mock()], 2
    callback = Throughput()
    callback.on_train_start(trainer, module)
    for _ in range(2):
        step(callback, trainer, module, clock, 4)
    module.log_dict.assert_called_once_with({"train/images_per_second": 1.0}, batch_size=1)
    step(callback, trainer, module, clock, 4)
    callback.on_validation_start(trainer, module)
    clock[0] += 1000
    trainer.strategy.root_device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "synchronize", pytest.fail)
    step(callback, trainer, module, clock, 12)
    module.log_dict.assert_called_with({"train/images_per_second": 0.5, "train/gpu_memory_gib": 1.5}, batch_size=1)


@pytest.mark.parametrize(
    ("multiplier", "names"),
    [
        (0.1, ["backbone", "backbone_no_decay", "decoders", "decoders_no_decay"]),
        (1.0, ["network", "network_no_decay"]),
    ],
)
def test_learning_rates_are_named_by_the_networks_parts(multiplier, names):
    """So that Lightning's monitor logs lr/backbone and the like."""
    parts = {name: nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)) for name in ("backbone", "decoder")}
    groups = parameter_groups(nn.ModuleDict(parts), lr=1e-3, backbone_lr_multiplier=multiplier)
    assert [group["name"] for group in groups] == names
