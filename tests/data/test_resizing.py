from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.transforms import pick_window, resize, resize_window, resized_size


@pytest.mark.parametrize(
    ("size", "edge", "longest", "expected"),
    [
        ((1024, 2048), 512, 4096, (512, 1024)),
        ((1024, 2048), 2048, 4096, (2048, 4096)),
        ((1024, 2048), 2048, 2048, (1024, 2048)),
        ((100, 150), 614, None, (614, 921)),
        ((150, 100), 640, 800, (800, 533)),
        ((3, 7), 10, None, (10, 23)),
        ((1, 1000), 8, 100, (1, 100)),
    ],
)
def test_resized_size(size, edge, longest, expected):
    assert resized_size(*size, edge, longest) == expected


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)


def pillow(array: np.ndarray, size: tuple[int, int], mode: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(array).resize(size[::-1], mode))


lengths = st.integers(1, 90)


@st.composite
def windows(draw, size):
    cuts = []
    for length in size:
        start = draw(st.integers(0, length - 1))
        cuts.append(slice(start, draw(st.integers(start + 1, length))))
    return tuple(cuts)


@given(data=st.data(), source=st.tuples(lengths, lengths), size=st.tuples(lengths, lengths))
@settings(max_examples=300, deadline=None)
def test_window_is_that_of_the_whole_image(data, source, size):
    """Up and down, by any factors: image within one grey level, map exactly."""
    window = data.draw(windows(size))
    image = noise(*source)
    whole = pillow(image, size, Image.Resampling.BILINEAR)
    assert np.array_equal(resize(image, size), whole)
    difference = resize_window(image, size, window).astype(int) - whole[window]
    assert np.abs(difference).max() <= 1
    ids = (np.arange(image[..., 0].size, dtype=np.int32) * 1000).reshape(source)
    assert np.array_equal(pick_window(ids, size, window), pillow(ids, size, Image.Resampling.NEAREST)[window])


@pytest.mark.parametrize("edge", [int(0.1 * step * 1024) for step in range(5, 21)])
def test_papers_sizes_at_full_size(edge):
    rng = np.random.default_rng(edge)
    # Half noise, which any error shows in, and half a photograph's smoothness.
    image = noise(1024, 2048)
    image[:, 1024:] = (np.arange(1024 * 1024).reshape(1024, 1024, 1) // 4096 + np.arange(3)) % 256
    ids = rng.integers(0, 34000, (1024, 2048), np.int32)
    size = (edge, 2 * edge)
    top, left = rng.integers(0, edge - 511), rng.integers(0, 2 * edge - 1023)
    window = (slice(int(top), int(top) + 512), slice(int(left), int(left) + 1024))
    difference = np.abs(
        resize_window(image, size, window).astype(int) - pillow(image, size, Image.Resampling.BILINEAR)[window]
    )
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05  # most where ratios are simple, so that many values lie between two
    assert np.array_equal(pick_window(ids, size, window), pillow(ids, size, Image.Resampling.NEAREST)[window])


@pytest.mark.parametrize("size", [(80, 160), (320, 640), (37, 74)])
def test_the_rest_of_the_image_has_no_influence(size):
    """What lies farther away than the filter reaches may be anything."""
    image, ids = noise(160, 320), np.arange(160 * 320, dtype=np.int32).reshape(160, 320)
    window = tuple(slice(length // 4, length // 2) for length in size)
    reach = max(160 / size[0], 1) + 1
    near = np.zeros((160, 320), bool)
    near[int(40 - reach) : int(80 + reach) + 1, int(80 - reach) : int(160 + reach) + 1] = True
    other_image, other_ids = image.copy(), ids.copy()
    other_image[~near], other_ids[~near] = 0, -1
    assert np.array_equal(resize_window(other_image, size, window), resize_window(image, size, window))
    assert np.array_equal(pick_window(other_ids, size, window), pick_window(ids, size, window))
