from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer

from pem_lightning.inference.postprocess import Result
from pem_lightning.metrics.evaluator import Evaluator
from pem_lightning.training.module import PEMModule
from pem_lightning.types import Batch, ClassInfo, DatasetInfo, Sample, Segment


@pytest.fixture
def info():
    """A thing, stuff, and a thing that does not occur."""
    classes = (
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("sky", (70, 130, 180), False, 23),
        ClassInfo("train", (0, 80, 100), True, 31),
    )
    return DatasetInfo("toy", classes)


@pytest.fixture
def trainer():
    """Stands in for Lightning's in a training's only process."""
    return Mock(
        spec=Trainer,
        callback_metrics={},
        checkpoint_callbacks=[],
        current_epoch=0,
        global_rank=0,
        global_step=5,
        is_global_zero=True,
        log_every_n_steps=2,
        loggers=[],
        max_epochs=-1,
        max_steps=10,
        state=Mock(fn="fit"),
        strategy=Mock(root_device=torch.device("cpu")),
        world_size=1,
    )


@pytest.fixture
def module(info):
    """Stands in for a module of the panoptic task."""
    return Mock(spec=PEMModule, info=info, inference=Mock(task="panoptic"), record={}, evaluated_step=5)


@pytest.fixture
def sample():
    """Left half a person, right half sky."""
    ids = torch.ones(20, 30, dtype=torch.int32)
    ids[:, 15:] = 2
    return Sample(torch.zeros(3, 20, 30, dtype=torch.uint8), ids, (Segment(1, 0, True), Segment(2, 1, False)), "a")


@pytest.fixture
def result(sample):
    """The truth."""
    return Result(sample.panoptic - 1, sample.panoptic, sample.segments)


@pytest.fixture
def evaluation(sample, result, info):
    """A perfect one."""
    evaluator = Evaluator(info, "panoptic")
    evaluator.update(result, sample)
    return evaluator.compute()


@pytest.fixture
def validate(trainer, module):
    """Runs a callback over batches of one image: (callback, samples, results, scores)."""

    def run(callback, samples, results, scores=None):
        callback.on_validation_start(trainer, module)
        for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
            outputs = {"results": [result], "scores": [None if scores is None else scores[i]]}
            callback.on_validation_batch_end(trainer, module, outputs, Batch([sample.image], [], [sample]), i)
        callback.on_validation_end(trainer, module)

    return run
