"""Bilinear resizing of some rows of a map, equal to resizing the whole map and taking these rows.

The rule is that of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

Legend: M maps, H W the source, R rows wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Size = tuple[int, int]


def source_rows(rows: range, source_height: int, height: int) -> range:
    """Which rows of the source some rows of the result are made of.

    Args:
        rows: of the result.
        source_height: of the whole source.
        height: of the whole result.
    """
    upper, lower, _ = _places(torch.arange(rows.start, rows.stop, dtype=torch.float64), source_height, height)
    # The places are found in the map's own precision below, which may round to the neighbour.
    return range(max(int(upper[0]) - 1, 0), min(int(lower[-1]) + 2, source_height))


def resize_rows(
    part: Float[Tensor, "M _ W"], part_rows: range, rows: range, source_size: Size, size: Size
) -> Float[Tensor, "M R W_out"]:
    """Resize.

    Args:
        part: of the source, the rows `part_rows`; at least those that `source_rows` names.
        part_rows: which rows of the source these are.
        rows: the rows wanted of the result.
        source_size: height and width of the whole source.
        size: height and width of the whole result.
    """
    if source_size[0] == size[0]:
        part = part[:, rows.start - part_rows.start : rows.stop - part_rows.start]
    else:
        numbers = torch.arange(rows.start, rows.stop, dtype=part.dtype, device=part.device)
        upper, lower, weight = _places(numbers, source_size[0], size[0])
        part = torch.lerp(part[:, upper - part_rows.start], part[:, lower - part_rows.start], weight[:, None])
    if source_size[1] == size[1]:
        return part
    return F.interpolate(part[None], size=(len(rows), size[1]), mode="bilinear", align_corners=False)[0]


def _places(
    numbers: Float[Tensor, " R"], source_height: int, height: int
) -> tuple[Int64[Tensor, " R"], Int64[Tensor, " R"], Float[Tensor, " R"]]:
    """The rows above and below every row of the result, and the weight of the one below."""
    place = ((numbers + 0.5) * (source_height / height) - 0.5).clamp(min=0)
    upper = place.long().clamp(max=source_height - 1)
    return upper, (upper + 1).clamp(max=source_height - 1), (place - upper).clamp(0, 1)
