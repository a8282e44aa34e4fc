import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from pem_lightning.inference import regions
from pem_lightning.inference.regions import Middles, contours, encode_rle, find_regions, index_map


def blobs(seed: int, size: tuple[int, int], count: int) -> np.ndarray:
    """An index map of wavy regions 1 to `count`, and a few single pixels of 0."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    centres = rng.random((count, 2)) * size
    wave = 9 * np.sin(x / 13)
    index = np.argmin([(y + wave - a) ** 2 + (x - b) ** 2 for a, b in centres], axis=0) + 1
    index[rng.random(size) < 0.002] = 0
    return index.astype(np.uint8)


class TestRunLengths:
    @settings(max_examples=100, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 0.02, 0.5, 0.97, 1.0]))
    @example(0, 1, 1, 1.0)
    @example(0, 7, 9, 1.0)
    def test_are_cocos_own(self, seed, height, width, density):
        mask = np.random.default_rng(seed).random((height, width)) < density
        assert encode_rle(mask) == coco_mask.encode(np.asfortranarray(mask))["counts"].decode()

    @pytest.mark.parametrize("box", [(0, 0, 2048, 1024), (5, 0, 9, 1024), (0, 3, 2048, 4), (700, 300, 1500, 1024)])
    def test_of_large_masks(self, box):
        left, top, right, bottom = box
        mask = np.zeros((1024, 2048), bool)
        mask[top:bottom, left:right] = blobs(1, (bottom - top, right - left), 3) != 0
        for given_mask in (mask, mask[:, ::-1], mask.T, ~mask):
            assert encode_rle(given_mask) == coco_mask.encode(np.asfortranarray(given_mask))["counts"].decode()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (2, 2), (5, 1), (61, 83), (700, 301), (1500, 40), (1024, 1200)])
def test_lines_are_those_of_opencv(size):
    index = blobs(3, size, 9)
    edge = np.zeros(size, bool)
    edge[:, 1:] = index[:, 1:] != index[:, :-1]
    edge[1:] |= index[1:] != index[:-1]
    width = max(1, round(min(size) / 480))
    thick = cv2.dilate(edge.view(np.uint8), np.ones((width, width), np.uint8))
    expected = cv2.GaussianBlur(thick.astype(np.float32), (0, 0), 0.5)
    places, coverage = contours(index)
    drawn = np.zeros(size, np.float32)
    drawn.ravel()[places] = coverage
    assert ((drawn > 0) == (expected > 0)).all()
    assert np.abs(drawn - expected).max() <= 2**-23


@pytest.mark.parametrize(("size", "count"), [((40, 50), 3), ((211, 301), 9), ((64, 64), 1), ((1, 30), 2), ((30, 1), 2)])
def test_middles_without_opencv_are_as_far_inside(monkeypatch, size, count):
    index = blobs(count, size, count)
    found = [(i, region) for i, region in enumerate(find_regions(index, count), start=1) if region is not None]
    by_opencv = [Middles(index).of(i, region) for i, region in found]
    monkeypatch.setattr(regions, "opencv", lambda: None)
    exact = Middles(index)
    for (i, region), ((x, y), distance) in zip(found, by_opencv, strict=True):
        (own_x, own_y), own_distance = exact.of(i, region)
        assert own_distance == pytest.approx(distance, rel=1e-5)
        left, top, _, _ = region.box
        assert index[top + int(own_y), left + int(own_x)] == i
        # OpenCV's choice is one of the exact ones, but for its sums' rounding.
        assert exact.distances[top + int(y), left + int(x)] == pytest.approx(own_distance * 10_000, rel=1e-5)


def test_an_empty_map_has_no_regions():
    assert find_regions(index_map(np.zeros((0, 5), np.int32), [1, 2]), 2) == [None, None]
    assert find_regions(np.zeros((3, 4), np.uint8), 0) == []
