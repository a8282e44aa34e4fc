import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pem_lightning.training.batch_split import BatchSplit, micro_batches_of, split_batch
from pem_lightning.types import Batch, Target, UserError


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
    ("images", "devices", "limit", "cures"),
    [
        (32, 3, None, ["global_batch_size=30 or 33", "2 or 4 devices"]),
        (1, 1, None, ["global_batch_size=2"]),
        (8, 8, None, ["global_batch_size=16", "4 devices"]),
        (14, 2, 4, ["global_batch_size=12 or 16", "micro_batch_size=7"]),
        (14, 2, 3, ["global_batch_size=12 or 16", "micro_batch_size=7"]),
        (4, 1, 1, ["at least 2"]),
    ],
)
def test_impossible_splits_name_the_nearest(images, devices, limit, cures):
    with pytest.raises(UserError) as refused:
        split_batch(images, devices, limit)
    for cure in cures:
        assert cure in str(refused.value)


@given(images=st.integers(1, 100), devices=st.integers(1, 12), limit=st.none() | st.integers(2, 20))
def test_a_split_is_equal_and_fits_and_what_is_named_instead_is_possible(images, devices, limit):
    try:
        share, parts = split_batch(images, devices, limit)
    except UserError as refused:
        cures = str(refused).split("nearest that can: ")[1]
        for size in re.search(r"global_batch_size=(\d+)(?: or (\d+))?", cures).groups():
            assert size is None or split_batch(int(size), devices, limit)
        if match := re.search(r"(\d+)(?: or (\d+))? device", cures):
            assert all(split_batch(images, int(count), limit) for count in match.groups() if count)
        if match := re.search(r"micro_batch_size=(\d+)", cures):
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
