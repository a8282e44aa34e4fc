from unittest.mock import Mock

import pytest
import torch
from lightning import Trainer

from pem_lightning.inference.postprocess import Result
from pem_lightning.training.module import PEMModule
from pem_lightning.types import ClassInfo, DatasetInfo, Sample, Segment


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
    """Stands in for Lightning's, alone and at its only process."""
    return Mock(spec=Trainer, global_step=5, global_rank=0, world_size=1, is_global_zero=True, loggers=[])


@pytest.fixture
def module(info):
    """Stands in for a module of the panoptic task."""
    return Mock(spec=PEMModule, info=info, inference=Mock(task="panoptic"))


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
