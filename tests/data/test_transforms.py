from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.transforms import (
    PAPER_SHORTEST_EDGES,
    EvalTransform,
    SSDColorJitter,
    TrainTransform,
    pick_window,
    resize,
    resize_window,
    resized_size,
    square_transforms,
)
from pem_lightning.types import Sample, Segment, UserError

IDS = np.array([0, 7, 23, 24000, 33999], np.int32)
SEGMENTS = tuple(Segment(int(i), 0, False) for i in IDS[1:])
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
BILINEAR, NEAREST = Image.Resampling.BILINEAR, Image.Resampling.NEAREST


def make_sample(height: int = 40, width: int = 64) -> Sample:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, height, width), np.uint8)
    return Sample(torch.from_numpy(image), torch.from_numpy(rng.choice(IDS, (height, width))), SEGMENTS, "name")


def coded_sample(height: int, width: int) -> Sample:
    """Image and map that hold every pixel's own coordinates, so that each result shows where it came from."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)
    return Sample(image, (rows * 1000 + columns + 1).int(), SEGMENTS, "name")


def pillow(array: np.ndarray, size: tuple[int, int], mode: Image.Resampling) -> np.ndarray:
    return np.array(Image.fromarray(array).resize(size[::-1], mode))


def plain(crop, edges, **options) -> TrainTransform:
    """Without jitter and flip."""
    return TrainTransform(crop, edges, None, **{"color_jitter": False, "flip": 0.0, **options})


def test_paper_sizes():
    # The authors' configuration: [int(x * 0.1 * 1024) for x in range(5, 21)]
    assert PAPER_SHORTEST_EDGES[:3] == (512, 614, 716)
    assert (PAPER_SHORTEST_EDGES[-1], len(PAPER_SHORTEST_EDGES)) == (2048, 16)
    train, evaluate = square_transforms(640)
    assert (train.pipeline[0].shortest_edges[1], train.pipeline[0].max_size) == (384, 2560)
    assert (evaluate.shortest_edge, evaluate.max_size) == (640, 2560)
    assert train(make_sample()).image.shape == (3, 640, 640)


@given(seed=st.integers(0, 1000), flip=st.sampled_from([0.0, 1.0]))
@settings(max_examples=25, deadline=None)
def test_crop_and_flip_move_image_and_map_together(seed, flip):
    torch.manual_seed(seed)
    out = plain((16, 24), [40], flip=flip)(coded_sample(40, 64))
    assert out.panoptic.shape == (16, 24)
    rows, columns = (out.panoptic - 1) // 1000, (out.panoptic - 1) % 1000
    assert torch.equal(out.image[0].int(), rows)
    assert torch.equal(out.image[1].int(), columns)
    assert (columns.diff(dim=1) == (-1 if flip else 1)).all()
    assert (rows.diff(dim=0) == 1).all()


def test_every_size_and_place_is_drawn():
    transform = plain((1000, 1000), [10, 20, 40])
    assert {transform(make_sample(20, 30)).image.shape[1] for _ in range(15)} == {10, 20, 40}
    crop = plain((5, 2), [5])
    torch.manual_seed(0)
    counts = np.bincount([int(crop(coded_sample(5, 6)).image[1, 0, 0]) for _ in range(150)], minlength=5)
    assert len(counts) == 5
    assert counts.min() > 15


def test_scale_place_and_flip_are_independent():
    transform = TrainTransform((10, 20), [11, 80], None, color_jitter=False)
    torch.manual_seed(0)
    table = np.zeros((2, 2, 2), int)
    sample = coded_sample(80, 160)
    for _ in range(100):
        rows, columns, _ = transform(sample).image.float()
        large_scale = rows.max() - rows.min() < 30  # few source rows fill the crop
        below = rows.mean() > 40
        flipped = columns[0, 0] > columns[0, -1]
        table[int(large_scale), int(below), int(flipped)] += 1
    assert table.min() > 4


@pytest.mark.parametrize(("options", "grey"), [({}, 128), ({"pad_value": 7}, 7)])
def test_padding_at_bottom_and_right(options, grey):
    sample = make_sample(20, 30)
    out = plain((32, 48), [20], pad=True, **options)(sample)
    assert out.image.shape == (3, 32, 48)
    assert torch.equal(out.image[:, :20, :30], sample.image)
    assert torch.equal(out.panoptic[:20, :30], sample.panoptic)
    outside = torch.ones(32, 48, dtype=torch.bool)
    outside[:20, :30] = False
    assert (out.image[:, outside] == grey).all()
    assert (out.panoptic[outside] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(20, 90), (90, 20), (20, 20)])
def test_crop_is_clipped_to_the_image(height, width):
    out = TrainTransform((32, 48), [20], None)(make_sample(height, width))
    assert out.image.shape[1:] == (min(height, 32), min(width, 48)) == out.panoptic.shape


def test_map_stays_ids_and_segments_stay_listed():
    sample = make_sample()
    for _ in range(20):
        out = TrainTransform((16, 16), [20, 33, 57], None, pad=True)(sample)
        assert (out.image.dtype, out.panoptic.dtype) == (torch.uint8, torch.int32)
        assert out.image.is_contiguous()
        assert set(out.panoptic.unique().tolist()) <= set(IDS.tolist())
        assert (out.segments, out.name) == (SEGMENTS, "name")
    assert torch.equal(TrainTransform((40, 64), [40], None, flip=0.0)(sample).panoptic, sample.panoptic)


def test_same_seed_same_sample():
    transform, sample = TrainTransform((16, 16), [20, 33, 57], None), make_sample()

    def draw(seed):
        torch.manual_seed(seed)
        return [transform(sample) for _ in range(3)]

    first, again, other = draw(1), draw(1), draw(2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.image, b.image)
        assert torch.equal(a.panoptic, b.panoptic)
    assert not all(torch.equal(a.image, b.image) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0].image, first[1].image)


def test_eval_resizes_the_image_only():
    sample = make_sample()
    native, out = EvalTransform()(sample), EvalTransform(shortest_edge=80, max_size=100)(sample)
    assert torch.equal(native.image, sample.image)
    assert native.image.is_contiguous()
    expected = pillow(sample.image.permute(1, 2, 0).numpy(), (63, 100), BILINEAR)
    assert np.array_equal(out.image.permute(1, 2, 0).numpy(), expected)
    assert torch.equal(out.panoptic, sample.panoptic)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (TrainTransform, {"crop_size": (0, 10)}),
        (TrainTransform, {"crop_size": (10,)}),
        (TrainTransform, {"shortest_edges": ()}),
        (TrainTransform, {"shortest_edges": (512, -1)}),
        (TrainTransform, {"max_size": 0}),
        (TrainTransform, {"flip": 1.5}),
        (TrainTransform, {"pad_value": 256}),
        (EvalTransform, {"shortest_edge": 0}),
        (EvalTransform, {"shortest_edge": 5, "max_size": -1}),
        (EvalTransform, {"max_size": 100}),
        (SSDColorJitter, {"brightness": -1}),
        (SSDColorJitter, {"contrast": (1.5, 0.5)}),
        (SSDColorJitter, {"saturation": (1.0,)}),
        (SSDColorJitter, {"saturation": (-0.5, 1.0)}),
        (SSDColorJitter, {"hue": 91}),
        (SSDColorJitter, {"probability": 2}),
    ],
)
def test_numbers_out_of_range(kind, arguments):
    with pytest.raises(UserError, match=next(iter(arguments)) if kind is not SSDColorJitter else "color_jitter needs"):
        kind(**arguments)


# Resizing a window only.


@pytest.mark.parametrize(
    ("size", "edge", "longest", "expected"),
    [
        ((1024, 2048), 512, 4096, (512, 1024)),
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


lengths = st.integers(1, 90)


@st.composite
def windows(draw, size):
    cuts = []
    for length in size:
        start = draw(st.integers(0, length - 1))
        cuts.append(slice(start, draw(st.integers(start + 1, length))))
    return tuple(cuts)


@given(data=st.data(), source=st.tuples(lengths, lengths), size=st.tuples(lengths, lengths))
@settings(max_examples=60, deadline=None)
def test_window_is_that_of_the_whole_image(data, source, size):
    """Up and down, by any factors: image within one grey level, map exactly."""
    window = data.draw(windows(size))
    image = noise(*source)
    whole = pillow(image, size, BILINEAR)
    assert np.array_equal(resize(image, size), whole)
    difference = resize_window(image, size, window).astype(int) - whole[window]
    assert np.abs(difference).max() <= 1
    ids = (np.arange(image[..., 0].size, dtype=np.int32) * 1000).reshape(source)
    assert np.array_equal(pick_window(ids, size, window), pillow(ids, size, NEAREST)[window])


@pytest.mark.parametrize("edge", PAPER_SHORTEST_EDGES[::7])
def test_papers_sizes_at_full_size(edge):
    rng = np.random.default_rng(edge)
    # Half noise, which any error shows in, and half a photograph's smoothness.
    image = noise(1024, 2048)
    image[:, 1024:] = (np.arange(1024 * 1024).reshape(1024, 1024, 1) // 4096 + np.arange(3)) % 256
    ids = rng.integers(0, 34000, (1024, 2048), np.int32)
    size = (edge, 2 * edge)
    top, left = rng.integers(0, edge - 511), rng.integers(0, 2 * edge - 1023)
    window = (slice(int(top), int(top) + 512), slice(int(left), int(left) + 1024))
    difference = np.abs(resize_window(image, size, window).astype(int) - pillow(image, size, BILINEAR)[window])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.05  # most where ratios are simple, so that many values lie between two
    assert np.array_equal(pick_window(ids, size, window), pillow(ids, size, NEAREST)[window])


# Colours.


def test_one_distortion_at_a_time():
    neutral = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0, "contrast_first": True}
    for change in ({}, {"brightness": -0.5}, {"brightness": 17.25}, {"contrast": 0.8125}, {"contrast": 1.5}):
        drawn = neutral | change
        expected = np.clip(PIXELS.astype(float) * drawn["contrast"] + drawn["brightness"], 0, 255).astype(np.uint8)
        for first in (True, False):
            assert np.array_equal(SSDColorJitter().apply(PIXELS, **{**drawn, "contrast_first": first}), expected)


def test_jitter_draws_in_the_stated_ranges():
    jitter = SSDColorJitter()
    jitter.set_random_seed(0)
    drawn = [jitter.get_params() for _ in range(2000)]
    ranges = (("brightness", 0.0, -32, 32), ("contrast", 1.0, 0.5, 1.5), ("saturation", 1.0, 0.5, 1.5))
    for key, neutral, low, high in ranges:
        values = np.array([d[key] for d in drawn])
        assert 0.45 < (values != neutral).mean() < 0.55
        assert low <= values.min() < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < values.max() <= high
    hues = np.array([d["hue"] for d in drawn])
    assert set(hues) == set(range(-18, 19))
    assert 0.42 < (hues != 0).mean() < 0.55
    assert 0.45 < np.mean([d["contrast_first"] for d in drawn]) < 0.55


def test_jitter_draws_what_it_is_told():
    jitter = SSDColorJitter(brightness=3, contrast=(2.0, 3.0), saturation=(0.0, 0.1), hue=2, probability=1.0)
    jitter.set_random_seed(0)
    drawn = [jitter.get_params() for _ in range(200)]
    assert max(abs(d["brightness"]) for d in drawn) <= 3
    assert all(2 <= d["contrast"] <= 3 and 0 <= d["saturation"] <= 0.1 for d in drawn)
    assert {d["hue"] for d in drawn} == {-2, -1, 0, 1, 2}
    never = SSDColorJitter(probability=0.0)
    assert np.array_equal(never.apply(PIXELS, **never.get_params()), PIXELS)


@pytest.mark.parametrize("seed", range(4))
def test_whole_jitter_by_the_formula(seed):
    """Everything at once, step by step in floating point, against the tables on 8-bit values."""
    jitter = SSDColorJitter(probability=1.0)
    jitter.set_random_seed(seed)
    drawn = jitter.get_params()
    out = jitter.apply(PIXELS, **drawn)

    def contrast(pixel):
        return np.clip(pixel * drawn["contrast"], 0, 255)

    errors = []
    for before, after in zip(PIXELS.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        pixel = np.clip(before + drawn["brightness"], 0, 255)
        if drawn["contrast_first"]:
            pixel = contrast(pixel)
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255))
        pixel = np.array(colorsys.hsv_to_rgb((h + drawn["hue"] / 180) % 1, min(s * drawn["saturation"], 1), v)) * 255
        errors.append(np.abs(after - (pixel if drawn["contrast_first"] else contrast(pixel))).max())
    assert max(errors) <= 14  # eight levels of the 8-bit hue, times a contrast of up to 1.5 after it, rounded down
    assert np.mean(errors) < 4
