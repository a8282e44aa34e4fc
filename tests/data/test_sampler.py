from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.data.sampler import EndlessSampler, EvalSampler, SampleKey, SeededDataset, TrainSampler
from pem_lightning.types import Sample

lengths, devices = st.integers(1, 60), st.integers(1, 5)


@given(length=lengths, world_size=devices, seed=st.integers(0, 2**64 - 1))
def test_devices_share_an_epoch(length, world_size, seed):
    parts = [list(TrainSampler(length, seed, rank, world_size)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {length // world_size} == {len(TrainSampler(length, seed, 0, world_size))}
    items = [key.item for part in parts for key in part]
    assert len(set(items)) == len(items)
    assert set(items) <= set(range(length))


@given(length=lengths, world_size=devices)
def test_all_devices_together_load_what_one_would(length, world_size):
    alone = list(TrainSampler(length, 3))
    parts = [TrainSampler(length, 3, rank, world_size) for rank in range(world_size)]
    together = [key for step in zip(*parts, strict=True) for key in step]
    assert together == alone[: len(together)]


def test_every_epoch_is_new_and_repeatable():
    sampler = TrainSampler(50, 7)
    first, second = list(sampler), list(sampler)
    assert sorted(key.item for key in first) == sorted(key.item for key in second) == list(range(50))
    assert [key.item for key in first] != [key.item for key in second]
    assert len({key.seed for key in first + second}) == 100
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(sampler) == second
    assert list(TrainSampler(50, 8)) != first


@settings(max_examples=30)
@given(length=st.integers(12, 60), world_size=st.integers(1, 3), batch_size=st.integers(1, 4), start=st.integers(0, 40))
def test_an_endless_stream_goes_on_from_any_batch(length, world_size, batch_size, start):
    def stream(rank, start, size=batch_size):
        return iter(EndlessSampler(length, 3, rank, world_size, batch_size=size, start=start))

    for rank in range(world_size):
        whole = list(islice(stream(rank, 0), (start + 9) * batch_size))
        assert list(islice(stream(rank, start), 9 * batch_size)) == whole[start * batch_size :]
    epochs = TrainSampler(length, 3, 0, world_size)
    per_epoch = length // world_size // batch_size * batch_size
    assert list(islice(stream(0, 0), 2 * per_epoch)) == [*list(epochs)[:per_epoch], *list(epochs)[:per_epoch]]
    with pytest.raises(TypeError, match="no length"):
        len(EndlessSampler(length, 3, batch_size=batch_size))


@given(length=st.integers(0, 40), world_size=devices)
def test_every_item_is_evaluated_once(length, world_size):
    parts = [EvalSampler(length, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
    assert sorted(key.item for part in parts for key in part) == list(range(length))
    assert list(EvalSampler(length)) == [SampleKey(i, i) for i in range(length)]


class Draws(torch.utils.data.Dataset):
    """Items that are nothing but what they draw."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 7:
            raise ValueError("broken")
        pixels = torch.randint(256, (3, 2, 2)).to(torch.uint8)
        return Sample(pixels, torch.zeros(2, 2, dtype=torch.int32), (), str(index))


@pytest.fixture
def dataset():
    result = SeededDataset.__new__(SeededDataset)  # its constructor wants segmentation data
    result.dataset = Draws()
    return result


def test_a_key_decides_what_is_drawn(dataset):
    assert len(dataset) == 8
    first = dataset[SampleKey(3, 11)]
    torch.rand(5)
    assert first.name == "3"
    assert torch.equal(dataset[SampleKey(3, 11)].image, first.image)
    assert not torch.equal(dataset[SampleKey(3, 12)].image, first.image)


@pytest.mark.parametrize("item", [0, 7])
def test_the_generator_of_training_goes_on_undisturbed(dataset, item):
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    if item == 7:
        with pytest.raises(ValueError, match="broken"):
            dataset[SampleKey(item, 5)]
    else:
        dataset[SampleKey(item, 5)]
    assert torch.equal(torch.rand(4), expected)
