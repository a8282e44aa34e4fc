"""Areas and boxes of the regions of an id map, in milliseconds for two megapixels.

A region's index is its position in a list of ids, counted from 1; 0 is what belongs to none. Few regions fit into
bytes, which everything that looks at every pixel is several times faster with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Integer
from scipy import ndimage

IndexMap = Integer[np.ndarray, "height width"]
Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first ones outside."""


class Region(NamedTuple):
    """Where the pixels of one index are: how many there are, and the smallest box around them."""

    area: int
    box: Box

    @property
    def window(self) -> tuple[slice, slice]:
        """The box as rows and columns of an array."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)


def index_map(ids: Integer[np.ndarray, "height width"], known: Sequence[int]) -> IndexMap:
    """Every pixel's position in the list `known`, counted from 1; 0 where its id is not listed.

    Args:
        ids: of any size and sign.
        known: unique ids, 1 or more.
    """
    # one entry more at either end is 0, to which all ids beyond are clipped
    table = np.zeros(max(known, default=0) + 2, np.uint8 if len(known) < 256 else np.int32)
    table[list(known)] = np.arange(1, len(known) + 1)
    return np.take(table, ids, mode="clip")


def find_regions(index: IndexMap, count: int) -> list[Region | None]:
    """Area and box of the indices 1 to `count`; None where there is no pixel."""
    areas = np.bincount(index.ravel(), minlength=count + 1)
    regions: list[Region | None] = []
    for area, window in zip(areas[1:].tolist(), ndimage.find_objects(index, max_label=count), strict=False):
        if window is None:
            regions.append(None)
        else:
            rows, columns = window
            regions.append(Region(area, (columns.start, rows.start, columns.stop, rows.stop)))
    return regions


def region_of(mask: Bool[np.ndarray, "height width"]) -> Region | None:
    """Area and box of a mask; None if it is empty."""
    area = int(np.count_nonzero(mask))
    if area == 0:
        return None
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    return Region(area, (left, top, left + width, top + height))
