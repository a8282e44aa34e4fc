"""Resizing some rows equals resizing everything and taking them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.inference.fast_argmax import resize_rows, source_rows


@settings(max_examples=80, deadline=None)
@given(st.data(), *(st.integers(1, 60) for _ in range(4)), st.sampled_from([torch.float32, torch.float64]))
def test_equals_resizing_everything(data, height, width, new_height, new_width, dtype):
    start = data.draw(st.integers(0, new_height - 1))
    rows = range(start, data.draw(st.integers(start + 1, new_height)))
    maps = torch.randn(2, height, width, generator=torch.Generator().manual_seed(0), dtype=dtype)
    needed = source_rows(rows, height, new_height)
    part = maps[:, needed.start : needed.stop]
    actual = resize_rows(part, needed, rows, (height, width), (new_height, new_width))
    expected = F.interpolate(maps[None], (new_height, new_width), mode="bilinear", align_corners=False)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(actual, expected[:, rows.start : rows.stop], rtol=0, atol=tolerance)


@pytest.mark.parametrize("height", [8192, 12345])
def test_large_maps_in_single_precision(height):
    """Where float32 places of rows are no longer exact, they are the same as those of PyTorch."""
    maps = torch.randn(1, height // 4, 2)
    rows = range(height - 100, height)
    needed = source_rows(rows, height // 4, height)
    actual = resize_rows(maps[:, needed.start : needed.stop], needed, rows, (height // 4, 2), (height, 2))
    expected = F.interpolate(maps[None], (height, 2), mode="bilinear", align_corners=False)[0, :, -100:]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3)
