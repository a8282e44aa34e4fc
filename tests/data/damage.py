"""Small images, and all kinds of damage to the bytes of a file, for hypothesis to draw from."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.types import UserError

RNG = np.random.default_rng(0)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8)).resize((24, 16)))
IDS = RNG.choice(np.array([0, 7, 11, 24000, 26012], np.uint16), (16, 24))
SIGNATURES = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"RIFF\x10\0\0\0WEBP", b"BM", b"P6 9 9 255\n"]


def encoded(array: np.ndarray, kind: str, **options) -> bytes:
    Image.fromarray(array).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


def save(path: Path | str, array: np.ndarray) -> None:
    """As an image file, in a folder that is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def flipped(flips):
    def apply(data):
        damaged = bytearray(data)
        for place, mask in flips:
            damaged[int(place * len(data))] ^= mask
        return bytes(damaged)

    return apply


places = st.floats(0, 1, exclude_max=True)
truncations = places.map(lambda place: lambda data: data[: int(place * len(data))])
flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=8).map(flipped)
garbage = st.tuples(st.sampled_from(SIGNATURES), st.binary(max_size=300)).map(lambda p: lambda data: b"".join(p))
insertions = st.tuples(places, st.binary(min_size=1, max_size=50)).map(
    lambda p: lambda data: data[: int(p[0] * len(data))] + p[1] + data[int(p[0] * len(data)) :]
)
damages = st.one_of(truncations, flips, garbage, insertions)
"""Functions from a file's bytes to damaged ones."""


def outcome(function, *arguments):
    """A result and None, or None and the error of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says about damaged files
        try:
            return function(*arguments), None
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    return None, message
