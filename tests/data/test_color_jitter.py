from __future__ import annotations

import colorsys

import numpy as np
import pytest

from pem_lightning.data.transforms import SSDColorJitter
from pem_lightning.types import UserError

NEUTRAL = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0, "contrast_first": True}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)


def test_neutral_jitter_changes_nothing():
    assert np.array_equal(SSDColorJitter().apply(PIXELS, **NEUTRAL), PIXELS)


@pytest.mark.parametrize("beta", [-32.0, -0.5, 17.25, 32.0])
def test_brightness_adds(beta):
    expected = np.clip(PIXELS.astype(float) + beta, 0, 255).astype(np.uint8)
    assert np.array_equal(SSDColorJitter().apply(PIXELS, **{**NEUTRAL, "brightness": beta}), expected)


@pytest.mark.parametrize("contrast_first", [True, False])
@pytest.mark.parametrize("factor", [0.5, 0.8125, 1.5])
def test_contrast_multiplies(factor, contrast_first):
    parameters = {**NEUTRAL, "contrast": factor, "contrast_first": contrast_first}
    expected = np.clip(PIXELS.astype(float) * factor, 0, 255).astype(np.uint8)
    assert np.array_equal(SSDColorJitter().apply(PIXELS, **parameters), expected)


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, 0), (1.5, 0), (1.0, 18), (1.0, -18), (0.7, 11)])
def test_saturation_and_hue_by_the_formula(saturation, hue):
    out = SSDColorJitter().apply(PIXELS, **{**NEUTRAL, "saturation": saturation, "hue": hue})
    for before, after in zip(PIXELS.reshape(-1, 3), out.reshape(-1, 3), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(before / 255))
        expected = np.array(colorsys.hsv_to_rgb((h + hue / 180) % 1.0, min(s * saturation, 1.0), v)) * 255
        # 8-bit hue has steps of two degrees: up to 255 / 60 grey levels each for reading and writing, and saturation's.
        assert np.abs(after - expected).max() <= 8


def test_contrast_before_or_after_saturation():
    pixel = np.full((1, 1, 3), (200, 180, 120), np.uint8)
    strong = {**NEUTRAL, "contrast": 1.5, "saturation": 0.5}
    first = SSDColorJitter().apply(pixel, **strong)
    last = SSDColorJitter().apply(pixel, **{**strong, "contrast_first": False})
    assert first[0, 0].max() == last[0, 0].max() == 255
    assert first[0, 0, 2] < last[0, 0, 2]  # clipped first, the pixel keeps its blue darker


def test_jitter_draws_in_the_stated_ranges():
    jitter = SSDColorJitter()
    jitter.set_random_seed(0)
    drawn = [jitter.get_params() for _ in range(2000)]
    for key, neutral, low, high in (
        ("brightness", 0.0, -32, 32),
        ("contrast", 1.0, 0.5, 1.5),
        ("saturation", 1.0, 0.5, 1.5),
    ):
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


@pytest.mark.parametrize(
    "arguments",
    [
        {"brightness": -1},
        {"contrast": (1.5, 0.5)},
        {"saturation": (1.0,)},
        {"saturation": (-0.5, 1.0)},
        {"hue": 91},
        {"probability": 2},
    ],
)
def test_jitter_refuses(arguments):
    with pytest.raises(UserError, match="color_jitter needs"):
        SSDColorJitter(**arguments)


@pytest.mark.parametrize("seed", range(6))
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
