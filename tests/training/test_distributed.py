import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pem_lightning.cli.build import build_trainer
from pem_lightning.models.layers import FrozenBatchNorm2d
from pem_lightning.training.distributed import BatchSplit, PlainSyncBatchNorm, micro_batches_of, split_batch
from pem_lightning.types import Batch, Target, UserError
from tests.jobs import compose


@pytest.mark.parametrize(
    ("images", "devices", "limit", "expected"),
    [
        (32, 1, None, (32, 1)),
        (32, 1, 16, (32, 2)),
        (32, 4, 16, (8, 1)),
        (32, 4, 3, (8, 4)),
        (12, 1, 5, (12, 3)),  # equal parts: three of 4, although 5 would fit
        (2, 1, 2, (2, 1)),
        (14, 2, 16, (7, 1)),
    ],
)
def test_the_fewest_equal_parts(images, devices, limit, expected):
    assert split_batch(images, devices, limit) == BatchSplit(*expected)


@pytest.mark.parametrize(
    ("images", "devices", "limit", "hints"),
    [
        (32, 3, None, ["cannot be shared out equally", "global_batch_size=30 or 33", "2 or 4 devices"]),
        (1, 1, None, ["too small for 1 device", "global_batch_size=2"]),
        (8, 8, None, ["too small for 8 devices", "global_batch_size=16", "4 devices"]),
        (14, 2, 4, ["no equal parts of 2 to 4", "global_batch_size=12 or 16", "micro_batch_size=7"]),
        (14, 2, 3, ["global_batch_size=12 or 16", "micro_batch_size=7"]),
        (4, 1, 1, ["at least 2"]),
    ],
)
def test_impossible_splits_name_the_nearest(images, devices, limit, hints):
    with pytest.raises(UserError) as refused:
        split_batch(images, devices, limit)
    for hint in hints:
        assert hint in str(refused.value)


@settings(deadline=None)
@given(images=st.integers(1, 100), devices=st.integers(1, 12), limit=st.none() | st.integers(2, 20))
def test_a_split_is_equal_and_fits_and_what_is_named_instead_is_possible(images, devices, limit):
    try:
        share, parts = split_batch(images, devices, limit)
    except UserError as refused:
        hints = str(refused).split("nearest that can: ")[1]
        for size in re.search(r"global_batch_size=(\d+)(?: or (\d+))?", hints).groups():
            assert size is None or split_batch(int(size), devices, limit)
        if match := re.search(r"(\d+)(?: or (\d+))? device", hints):
            assert all(split_batch(images, int(count), limit) for count in match.groups() if count)
        if match := re.search(r"micro_batch_size=(\d+)", hints):
            assert split_batch(images, devices, int(match[1]))
        return
    assert share * devices == images
    assert share % parts == 0
    assert 2 <= share // parts <= (limit or share)


def test_parts_are_the_batch_in_order():
    images = [torch.full((3, 1, 1), i, dtype=torch.uint8) for i in range(6)]
    targets = [Target(torch.tensor([i]), torch.zeros(1, 1, 1, dtype=torch.bool)) for i in range(6)]
    parts = list(micro_batches_of(Batch(images, targets, []), 3))
    assert [[int(t.labels) for t in part.targets] for part in parts] == [[0, 1], [2, 3], [4, 5]]
    assert [int(image.max()) for part in parts for image in part.images] == list(range(6))


class NormAct(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


def test_plain_layers_are_synchronised_and_their_subclasses_are_not():
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm1d(3)), FrozenBatchNorm2d(4), NormAct(5))
    before = network.state_dict(keep_vars=True)
    network[1].eval()
    assert PlainSyncBatchNorm().apply(network) is network
    kinds = [type(m) for m in network.modules() if not isinstance(m, nn.Sequential)]
    assert kinds == [nn.SyncBatchNorm, nn.SyncBatchNorm, FrozenBatchNorm2d, NormAct]
    assert (network[0].training, network[1][0].training) == (True, False)
    after = network.state_dict(keep_vars=True)
    assert all(after[name] is before[name] for name in before)


def test_processes_on_a_cpu_keep_their_own_statistics(tmp_path):
    cfg = compose("train", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "logger=none")
    cfg.output_dir = str(tmp_path)
    trainer = build_trainer(cfg)
    assert trainer.world_size == 2
    assert trainer.strategy._layer_sync is None
