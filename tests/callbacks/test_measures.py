from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.profilers import PassThroughProfiler, SimpleProfiler
from torch import nn

from pem_lightning.callbacks import LearningRates, Throughput
from pem_lightning.callbacks import progress as measures
from pem_lightning.callbacks.progress import LoaderWait, learning_rates
from pem_lightning.training.module import PEMModule
from pem_lightning.training.optim import parameter_groups
from pem_lightning.types import Batch


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(measures.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measures.time, "perf_counter", lambda: now[0])
    return now


@pytest.fixture
def trainer():
    return Mock(
        spec=Trainer,
        global_step=0,
        log_every_n_steps=2,
        world_size=2,
        loggers=[Mock()],
        profiler=PassThroughProfiler(),
        strategy=Mock(root_device=torch.device("cpu")),
    )


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


def test_learning_rates_have_the_names_of_their_parts():
    network = Network()
    backbone = set(map(id, network.backbone.parameters()))
    groups = parameter_groups(network, lr=1e-3, backbone_lr_multiplier=0.1)
    assert len(groups) == 4  # with and without decay
    assert learning_rates(groups, backbone) == {"lr/backbone": 1e-4, "lr/decoders": 1e-3}
    together = parameter_groups(network, lr=1e-3, backbone_lr_multiplier=1.0)
    assert learning_rates(together, backbone) == {"lr/network": 1e-3}
    apart = [
        {"params": [p], "lr": lr} for p, lr in zip(network.decoder.parameters(), (1.0, 2.0, 1.0, 3.0), strict=True)
    ]
    assert learning_rates(apart, backbone) == {"lr/decoders": 1.0, "lr/decoders_2": 2.0, "lr/decoders_3": 3.0}


def test_learning_rates_are_logged_with_the_losses_only(trainer):
    module = Mock(spec=PEMModule, network=Network())
    trainer.optimizers = [torch.optim.SGD(module.network.parameters(), lr=0.5)]
    callback = LearningRates()
    callback.on_train_batch_start(trainer, module, None, 0)  # before the first step of two
    module.log_dict.assert_not_called()
    trainer.global_step = 1
    callback.on_train_batch_start(trainer, module, None, 1)
    module.log_dict.assert_called_once_with({"lr/network": 0.5}, batch_size=1)


def test_only_the_loader_is_waited_for(clock):
    wait = LoaderWait()
    for action, seconds in (("[_TrainingEpochLoop].train_dataloader_next", 3), ("run_training_batch", 50)):
        with wait.profile(action):
            clock[0] += seconds
    wait.stop("[_TrainingEpochLoop].train_dataloader_next")  # without a start
    assert wait.seconds == 3


def train(callback, trainer, module, clock, steps, validate_after=()):
    batch = Batch([torch.zeros(3, 1, 1)] * 3, [], [])
    for step in range(steps):
        with trainer.profiler.profile("[_TrainingEpochLoop].train_dataloader_next"):
            clock[0] += 1
        callback.on_train_batch_start(trainer, module, batch, step)
        clock[0] += 3
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, module, None, batch, step)
        if trainer.global_step in validate_after:
            callback.on_validation_start(trainer, module)
            clock[0] += 1000


def test_speed_and_wait_of_the_steps_since_they_were_logged(trainer, clock):
    callback, module = Throughput(), Mock(spec=PEMModule)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    train(callback, trainer, module, clock, 2)
    # 2 processes, 3 images and 4 seconds a step, one of which is the loader's
    expected = {"train/images_per_second": 1.5, "train/data_wait_percent": 25.0}
    module.log_dict.assert_called_once_with(expected, batch_size=1)
    train(callback, trainer, module, clock, 2, validate_after=(3,))
    # The batch after a validation had a second more to come, which is not waited for between steps.
    (values,), _ = module.log_dict.call_args
    assert values == {"train/images_per_second": 12 / 7, "train/data_wait_percent": 100 / 7}
    assert callback.watch.validating == 1001
    assert callback.data_wait_percent == 100 * 3 / 15


def test_a_profiler_of_the_users_stays(trainer, clock):
    trainer.profiler = SimpleProfiler()
    callback, module = Throughput(), Mock(spec=PEMModule)
    callback.setup(trainer, module, "fit")
    callback.on_train_start(trainer, module)
    assert isinstance(trainer.profiler, SimpleProfiler)
    train(callback, trainer, module, clock, 2)
    (values,), _ = module.log_dict.call_args
    assert list(values) == ["train/images_per_second"]
    assert callback.data_wait_percent is None


def test_memory_of_a_gpu_is_read_without_waiting_for_it(trainer, clock, monkeypatch):
    trainer.strategy.root_device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    monkeypatch.setattr(torch.cuda, "synchronize", pytest.fail)
    callback, module = Throughput(), Mock(spec=PEMModule)
    callback.on_train_start(trainer, module)
    train(callback, trainer, module, clock, 2)
    (values,), _ = module.log_dict.call_args
    assert values["train/gpu_memory_gib"] == 1.5
