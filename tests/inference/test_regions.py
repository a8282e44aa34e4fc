import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.inference.visualize import Region, find_regions, index_map, region_of


@pytest.mark.parametrize(("count", "dtype"), [(3, np.uint8), (255, np.uint8), (256, np.int32), (1000, np.int32)])
def test_few_regions_fit_into_bytes(count, dtype):
    ids = np.arange(count + 2, dtype=np.int32)[None]
    index = index_map(ids, range(1, count + 1))
    assert index.dtype == dtype
    assert index.tolist() == [[*range(count + 1), 0]]


def test_ids_of_any_size_and_sign_in_any_order():
    ids = np.array([[-5, 0, 7, 2**24 - 1, 2**31 - 1, -(2**31), 8, 6]], np.int32)
    assert index_map(ids, [2**24 - 1, 7]).tolist() == [[0, 0, 2, 1, 0, 0, 0, 0]]
    assert index_map(ids, []).tolist() == [[0] * 8]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 400), st.integers(1, 20), st.integers(1, 20))
def test_areas_and_boxes_are_those_of_the_masks(seed, count, height, width):
    ids = np.random.default_rng(seed).integers(0, count + 2, (height, width)).astype(np.int32)
    for i, region in enumerate(find_regions(index_map(ids, range(1, count + 1)), count), start=1):
        mask = ids == i
        assert region_of(mask) == region
        if region is None:
            assert not mask.any()
        else:
            rows, columns = np.nonzero(mask)
            assert region == Region(len(rows), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert mask[region.window].sum() == region.area
