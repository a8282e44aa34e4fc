"""Resizing as Pillow does it, computed only where it is needed. Enlarging all of an image to keep a part is waste.

H W height and width of the source, h w those of the window.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Int32, Integer, UInt8
from PIL import Image

Window = tuple[slice, slice]
"""Rows and columns, each with start and stop."""

_NEAR = 16


def resized_size(height: int, width: int, shortest_edge: int, max_size: int | None = None) -> tuple[int, int]:
    """Height and width after bringing the shortest edge to a length, as far as the longest stays within `max_size`."""
    scale = shortest_edge / min(height, width)
    if max_size is not None:
        scale = min(scale, max_size / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize(image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    """The whole image at another size, by antialiased bilinear interpolation."""
    height, width = size
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_window(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], window: Window
) -> UInt8[np.ndarray, "h w 3"]:
    """A window of `resize(image, size)`, computed from no more of the source than it depends on.

    Within one grey level of it. Pillow resizes rows, rounds, and then columns, and keeps the ends of a box in single
    precision, which can turn a value that lies between two. Both ways by boxes would now and then be off by two; so
    rows are resized between places where source and result have a common pixel border, which is exact. Columns are,
    too, where such borders are near.

    Args:
        image: the source; may be memory-mapped.
        size: height and width of the whole image after resizing.
        window: what to compute of the resized image.
    """
    (height, width), (new_height, new_width), (rows, columns) = image.shape[:2], size, window
    top, bottom = _widened(rows, new_height // math.gcd(height, new_height), new_height, at_most=_NEAR)
    left, right = _widened(columns, new_width // math.gcd(width, new_width), new_width)
    ys, y0, y1 = _source(top, bottom, height, new_height)
    xs, x0, x1 = _source(left, right, width, new_width)
    part = Image.fromarray(np.ascontiguousarray(image[ys, xs]))
    part = part.resize((right - left, part.height), Image.Resampling.BILINEAR, box=(x0, 0, x1, part.height))
    part = part.crop((columns.start - left, 0, columns.stop - left, part.height))
    part = part.resize((part.width, bottom - top), Image.Resampling.BILINEAR, box=(0, y0, part.width, y1))
    return np.array(part)[rows.start - top : rows.stop - top]


def pick_window(
    values: Integer[np.ndarray, "H W"], size: tuple[int, int], window: Window
) -> Integer[np.ndarray, "h w"]:
    """A window of a map that is resized to the nearest value, exactly as Pillow does; see `resize_window`."""
    rows, columns = (_nearest(*axis)[cut] for *axis, cut in zip(values.shape, size, window, strict=True))
    top, left = int(rows[0]), int(columns[0])
    source = values[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    return source.take(rows - top, axis=0).take(columns - left, axis=1)


def _widened(cut: slice, step: int, length: int, at_most: int | None = None) -> tuple[int, int]:
    """Start and stop of a cut, widened to multiples of a step that divides the length, unless it is too long."""
    if at_most is not None and step > at_most:
        return cut.start, cut.stop
    return cut.start // step * step, -(-cut.stop // step) * step


def _source(start: int, stop: int, length: int, new_length: int) -> tuple[slice, float, float]:
    """The source pixels that a stretch of a resized axis depends on, and the stretch's ends among them."""
    reach = max(length / new_length, 1.0)  # of the bilinear filter, which widens when it shrinks
    first, last = start * length / new_length, stop * length / new_length
    pixels = slice(max(math.floor(first - reach), 0), min(math.ceil(last + reach), length))
    return pixels, first - pixels.start, last - pixels.start


def _nearest(length: int, new_length: int) -> Int32[np.ndarray, " new_length"]:
    """The source index of every pixel of a resized axis, by Pillow itself: a formula would round ties otherwise."""
    indices = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.array(indices.resize((new_length, 1), Image.Resampling.NEAREST))[0]
