"""Masks as COCO's run-length encoding, thousands of times smaller than their pixels."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask
from torch import Tensor


class RLE(TypedDict):
    """COCO's compressed encoding in JSON's types: height and width, and the lengths of runs as text."""

    size: list[int]
    counts: str


def encode_mask(mask: Bool[Tensor, "height width"]) -> RLE:
    """Encode one mask."""
    # Columns first, as COCO counts runs.
    pixels = mask.T.contiguous().cpu().numpy().view(np.uint8).T
    encoded = coco_mask.encode(pixels)
    return RLE(size=[int(length) for length in encoded["size"]], counts=encoded["counts"].decode("ascii"))
