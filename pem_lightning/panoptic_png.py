"""The COCO panoptic format: a segment's id is written as the colour of its pixels, R + 256 G + 256² B."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int32, UInt8

MAX_ID = 256**3 - 1


def rgb_to_id(rgb: UInt8[np.ndarray, "height width 3"]) -> Int32[np.ndarray, "height width"]:
    """Segment ids from the colours of a COCO panoptic PNG."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    return red + 256 * green + 256**2 * blue


def id_to_rgb(ids: Int32[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """Colours that carry the segment ids, to be saved without loss (PNG).

    Raises:
        ValueError: an id is negative or does not fit into 24 bits.
    """
    if ids.size and (ids.min() < 0 or ids.max() > MAX_ID):
        raise ValueError(f"segment ids must be in 0..{MAX_ID}, got {ids.min()}..{ids.max()}")
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
