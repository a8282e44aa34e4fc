from itertools import combinations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.data.ade20k import ADE20K, ADE20K_PANOPTIC
from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.inference.regions import Region, find_regions, index_map, region_of
from pem_lightning.inference.visualize import (
    class_segments,
    draw_caption,
    overlay_colors,
    overlay_panoptic,
    side_by_side,
)
from pem_lightning.types import ClassInfo, DatasetInfo, Segment

INFO = DatasetInfo(
    "toy",
    (
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("a remarkably long class name", (0, 0, 142), True, 26),
        ClassInfo("sky", (70, 130, 180), False, 23),
    ),
)


def grey(height, width):
    return np.full((height, width, 3), 100, np.uint8)


def stripes(*ids, width=64):
    """An id map of 64 rows."""
    return torch.tensor(ids, dtype=torch.int32).repeat_interleave(width // len(ids)).repeat(64, 1)


def test_things_of_one_class_get_colours_apart():
    segments = [Segment(i, 1, True) for i in range(1, 9)]
    drawn = overlay_panoptic(grey(64, 128), stripes(*range(1, 9), width=128), segments, INFO, 1.0, draw_names=False)
    colors = drawn[32, 8::16].astype(int)
    assert colors[0].tolist() == [0, 0, 142]
    assert (np.abs(np.diff(colors, axis=0)).max(1) > 40).all()


@pytest.mark.parametrize(("is_thing", "shade_things"), [(True, False), (False, True)])
def test_colours_of_stuff_stay_with_the_class_and_those_of_things_can(is_thing, shade_things):
    segments = [Segment(1, 1, is_thing), Segment(2**24 - 1, 1, is_thing)]
    drawn = overlay_panoptic(grey(64, 64), stripes(2**24 - 1, 1), segments, INFO, 1.0, False, shade_things)
    assert drawn[32, 10].tolist() == drawn[32, 50].tolist() == [0, 0, 142]
    assert drawn[32, 32].min() > 142  # the line between them


@pytest.mark.parametrize(("alpha", "count"), [(0.0, 5), (0.3, 300), (0.55, 5), (1.0, 300)])
def test_every_pixel_is_what_the_formula_says(alpha, count):
    """Colours blended in float32, then lines: written down once more, plainly and slowly."""
    rng = np.random.default_rng(count)
    photo = rng.integers(0, 256, (90, 130, 3), np.uint8)
    before = photo.copy()
    ids = rng.integers(0, count + 2, (18, 26)).astype(np.int32).repeat(5, 0).repeat(5, 1)  # the last is unlisted
    segments = [Segment(i, int(rng.integers(3)), False) for i in range(1, count + 1)]
    drawn = overlay_panoptic(photo, torch.from_numpy(ids), segments, INFO, alpha, draw_names=False)

    opacity = np.where((ids > 0) & (ids <= count), np.float32(alpha), np.float32(0))[..., None]
    colors = np.array([(0, 0, 0), *(INFO.classes[s.class_id].color for s in segments), (0, 0, 0)], np.float32)
    expected = photo * (1 - opacity) + colors[ids] * opacity
    edge = np.zeros(ids.shape, np.float32)
    known = np.where(ids <= count, ids, 0)
    edge[:, 1:] = known[:, 1:] != known[:, :-1]
    edge[1:][known[1:] != known[:-1]] = 1
    line = cv2.GaussianBlur(edge, (0, 0), 0.5)[..., None] * np.float32(0.75)
    expected = expected * (1 - line) + np.float32(255) * line
    assert (drawn == expected.round().astype(np.uint8)).all()

    tensor = torch.from_numpy(photo).permute(2, 0, 1)
    assert (overlay_panoptic(tensor, torch.from_numpy(ids), segments, INFO, alpha, draw_names=False) == drawn).all()
    assert (photo == before).all()


class TestColours:
    def info(self, *colors):
        return DatasetInfo("x", tuple(ClassInfo(str(i), color, False, i) for i, color in enumerate(colors)))

    def nearest(self, colors):
        return min(max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in combinations(colors, 2))

    @pytest.mark.parametrize("info", [ADE20K, ADE20K_PANOPTIC])
    def test_roads_and_skyscrapers_differ(self, info):
        shared = [info.class_names.index(name) for name in ("road, route", "skyscraper")]
        ids, segments = class_segments(stripes(*shared), info)
        drawn = overlay_panoptic(grey(64, 64), ids, segments, info, 1.0, draw_names=False)
        assert drawn[32, 10].tolist() == [140, 140, 140]
        assert np.abs(drawn[32, 50].astype(int) - drawn[32, 10]).max() > 60
        assert info.colors[shared].tolist() == [[140] * 3] * 2  # in files as ever
        colors = overlay_colors(info)
        assert self.nearest(colors) >= 8
        assert sum(a != c.color for a, c in zip(colors, info.classes, strict=True)) == 2

    def test_colours_that_differ_stay(self):
        assert overlay_colors(CITYSCAPES) == tuple(c.color for c in CITYSCAPES.classes)

    @pytest.mark.parametrize("color", [(0, 0, 0), (128, 128, 128), (255, 255, 255), (160, 32, 160)])
    def test_a_set_of_one_colour_becomes_colourful_in_the_same_way_every_time(self, color):
        colors = overlay_colors(self.info(*[color] * 40))
        assert colors[0] == color
        assert self.nearest(colors) >= 30
        overlay_colors.cache_clear()
        assert overlay_colors(self.info(*[color] * 40)) == colors

    def test_class_indices_as_colours_are_told_apart(self):
        assert self.nearest(overlay_colors(self.info(*((i, i, i) for i in range(20))))) >= 8

    def test_no_class_takes_the_colour_of_a_later_one(self):
        later = overlay_colors(self.info((9, 9, 9), (9, 9, 9)))[1]
        assert overlay_colors(self.info((9, 9, 9), (9, 9, 9), later))[2] == later


def test_names_are_drawn_on_large_segments_only():
    segments = [Segment(1, 0, True)]
    large, small = torch.zeros(2, 256, 512, dtype=torch.int32)
    large[50:200, 100:400] = 1
    small[100:110, 100:110] = 1
    for id_map, named in ((large, True), (small, False)):
        with_name = overlay_panoptic(grey(256, 512), id_map, segments, INFO)
        without = overlay_panoptic(grey(256, 512), id_map, segments, INFO, draw_names=False)
        assert (with_name != without).any() == named


@pytest.mark.parametrize("size", [(32, 32), (33, 250), (250, 33), (1, 1), (480, 640)])
def test_every_size_works(size):
    id_map = torch.ones(size, dtype=torch.int32)
    id_map[size[0] // 2 :] = 2
    drawn = overlay_panoptic(grey(*size), id_map, [Segment(1, 1, True), Segment(2, 2, False)], INFO)
    assert drawn.shape == (*size, 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_class_map_with_void(dtype):
    ids, segments = class_segments(stripes(255, 2).to(dtype), INFO)
    drawn = overlay_panoptic(grey(64, 64), ids, segments, INFO, alpha=1.0, draw_names=False)
    assert drawn[32, 10].tolist() == [100, 100, 100]
    assert drawn[32, 50].tolist() == [70, 130, 180]


def test_side_by_side_brings_images_to_one_height():
    sheet = side_by_side([grey(64, 64), grey(128, 64)], ["photograph", "prediction"])
    assert sheet.dtype == np.uint8
    assert sheet.shape[0] > 64
    assert sheet.shape[1] == 64 + 32 + 2
    assert (sheet[-1, :64] == 100).all()


def test_a_caption_is_written_into_the_corner():
    picture = grey(128, 256)
    draw_caption(picture, "12.3 fps")
    assert picture[:10, :6].max() < 100
    assert picture[:18, :60].max() > 200
    assert (picture[40:] == 100).all()
    draw_caption(grey(1, 1), "12.3 fps")


class TestRegions:
    @pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.int32)])
    def test_few_fit_into_bytes(self, count, dtype):
        index = index_map(np.arange(count + 2, dtype=np.int32)[None], range(1, count + 1))
        assert index.dtype == dtype
        assert index.tolist() == [[*range(count + 1), 0]]

    def test_ids_of_any_size_and_sign_in_any_order(self):
        ids = np.array([[-5, 0, 7, 2**24 - 1, 2**31 - 1, -(2**31), 8, 6]], np.int32)
        assert index_map(ids, [2**24 - 1, 7]).tolist() == [[0, 0, 2, 1, 0, 0, 0, 0]]
        assert index_map(ids, []).tolist() == [[0] * 8]

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 20), st.integers(1, 20))
    def test_areas_and_boxes_are_those_of_the_masks(self, seed, count, height, width):
        ids = np.random.default_rng(seed).integers(0, count + 2, (height, width)).astype(np.int32)
        for i, region in enumerate(find_regions(index_map(ids, range(1, count + 1)), count), start=1):
            if region is None:
                assert i not in ids
                continue
            mask = ids == i
            rows, columns = np.nonzero(mask)
            assert region == Region(len(rows), (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            assert region_of(mask) == region
            assert mask[region.window].sum() == region.area
        assert region_of(np.zeros((3, 4), bool)) is None
