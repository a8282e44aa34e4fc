"""The regions of an id map in NumPy: areas, boxes, run lengths, outlines, lines between them, innermost points."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from pem_lightning.basic_types import UserError
from pem_lightning.shapes import Bool, Float32, Int32, Int64, Integer

Box = tuple[int, int, int, int]
"""Left, top, right and bottom in pixels; right and bottom are the first ones outside."""
IndexMap = Integer[np.ndarray, "height width"]
"""Position of each pixel's segment in a list, counted from 1; 0 for none. Bytes if possible: several times faster."""


class Region(NamedTuple):
    """Number of pixels of a segment, and the smallest box around them."""

    area: int
    box: Box

    @property
    def window(self) -> tuple[slice, slice]:
        """The box as rows and columns of an array."""
        left, top, right, bottom = self.box
        return slice(top, bottom), slice(left, right)


@cache
def opencv() -> Any:
    """OpenCV where it is installed, for what it does several times faster; else None."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def index_map(ids: Integer[np.ndarray, "height width"], known: Sequence[int]) -> IndexMap:
    """Replace ids by their positions in `known`, whose ids are unique and 1 or more."""
    # The table has one more entry, 0, at either end, to which all ids beyond are clipped.
    table = np.zeros(max(known, default=0) + 2, np.uint8 if len(known) < 256 else np.int32)
    table[list(known)] = np.arange(1, len(known) + 1)
    return np.take(table, ids, mode="clip")


def find_regions(index: IndexMap, count: int) -> list[Region | None]:
    """Regions of the indices 1 to `count`; None where there is no pixel."""
    # A run is a stretch of one index in a row; there are far fewer of them than pixels.
    begins = np.ones(index.shape, bool)
    np.not_equal(index[:, 1:], index[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=index.size)
    values = index.ravel()[starts]
    order = np.argsort(values, kind="stable")
    starts, lengths, values = starts[order], lengths[order], values[order]
    rows, lefts = np.divmod(starts, max(index.shape[1], 1))
    firsts = np.flatnonzero(np.diff(values.astype(np.int64), prepend=-1))  # run of each index
    found: list[Region | None] = [None] * (count + 1)
    if len(firsts):
        columns = (
            np.add.reduceat(lengths, firsts),
            np.minimum.reduceat(lefts, firsts),
            rows[firsts],
            np.maximum.reduceat(lefts + lengths, firsts),
            np.maximum.reduceat(rows, firsts) + 1,
        )
        for i, (area, *box) in zip(values[firsts].tolist(), np.stack(columns, 1).tolist(), strict=True):
            left, top, right, bottom = box
            found[i] = Region(area, (left, top, right, bottom))
    return found[1:]


def region_of(mask: Bool[np.ndarray, "height width"]) -> Region | None:
    """The region of a mask; None if it is empty."""
    rows = np.flatnonzero(mask.any(1))
    if len(rows) == 0:
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(0))
    box = int(columns[0]), top, int(columns[-1]) + 1, bottom
    return Region(int(np.count_nonzero(mask)), box)


def encode_rle(mask: Bool[np.ndarray, "height width"]) -> str:
    """COCO's compressed run lengths of a mask, as `pycocotools.mask.encode` writes them.

    Columns first, background first. From the fourth on, a length is stored as its difference from the last but one. A
    number is written in groups of five bits, lowest first, each with a sixth bit that says whether more follow.
    """
    changes = [0]
    if region := region_of(mask):
        left, top, right, bottom = region.box
        # The box alone, with a row of background below it unless the next column follows at once, and around it.
        rows = bottom - top + (bottom - top < len(mask))
        box = np.zeros((right - left, rows), bool)
        box[:, : bottom - top] = mask[region.window].T
        column, row = np.divmod(np.flatnonzero(np.diff(box.ravel(), prepend=False, append=False)), rows)
        changes += ((left + column) * len(mask) + top + row).tolist()
    lengths = np.diff(changes if changes[-1] == mask.size else [*changes, mask.size])
    numbers = lengths.copy()
    numbers[3:] -= lengths[1:-2]
    groups, kept = [], []
    going = np.ones(len(numbers), bool)
    while going.any():
        bits = numbers & 31
        numbers >>= 5
        more = np.where(bits & 16, numbers != -1, numbers != 0)
        groups.append((bits | more << 5) + 48)
        kept.append(going)
        going = going & more
    return np.stack(groups, 1)[np.stack(kept, 1)].astype(np.uint8).tobytes().decode()


def outlines(mask: Bool[np.ndarray, "height width"], tolerance: int | float = 0) -> list[Int64[np.ndarray, "points 2"]]:
    """Closed polygons (x, y) around the regions of a mask, along the edges of its pixels.

    Pixels that touch at a corner are one region. A hole is joined to its region's outline by a seam without width,
    which is walked there and back, and around it the way goes in the other direction. So filling gives the mask to the
    pixel, by the even-odd rule, as in pycocotools, and by the non-zero rule.

    Args:
        mask: of one object or class.
        tolerance: how far in pixels a simplified outline may be from the exact one (Douglas and Peucker, 1973). No
            region is lost, but holes may be. Needs OpenCV if it is above 0.

    Raises:
        UserError: OpenCV is missing, or the tolerance is below 0.
    """
    if tolerance < 0:
        raise UserError(f"tolerance={tolerance}: give 0 for exact outlines, or a distance in pixels")
    simplify = _simplifier(tolerance) if tolerance else None
    polygons = []
    for outer, holes in _rings(mask):
        if simplify is not None:
            outer, holes = simplify(outer, outer), [s for hole in holes if len(s := simplify(hole, hole[:0]))]
        polygons.append(_with_seams(outer, holes))
    return polygons


def _simplifier(tolerance: int | float) -> Any:
    """A function of a ring, and of what to take where fewer than three points are left of it."""
    cv2 = opencv()
    if cv2 is None:
        raise UserError("a tolerance above 0 needs OpenCV: pip install opencv-python-headless, or leave it out")

    def simplify(ring: np.ndarray, otherwise: np.ndarray) -> np.ndarray:
        points = cv2.approxPolyDP(ring.astype(np.int32)[:, None], float(tolerance), True)[:, 0].astype(np.int64)
        return points if len(points) >= 3 else otherwise

    return simplify


def _rings(mask: Bool[np.ndarray, "height width"]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """The corners of every region's outer ring and of the rings around its holes.

    Corners in the order of rows are in pairs the ends of horizontal edges, in the order of columns those of vertical
    edges. Walking along them in turn gives the rings; each begins at its topmost edge, on the left. Outer rings are
    clockwise, holes are not.
    """
    padded = np.pad(mask, 1)
    nw, ne, sw, se = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    touching = (nw == se) & (ne == sw) & (nw != ne)  # two pixels at their corners: two corners in one place
    rows, columns = np.nonzero((nw ^ ne ^ sw ^ se) | touching)
    copies = 1 + touching[rows, columns]
    second = np.arange(copies.sum()) != np.repeat(np.cumsum(copies) - copies, copies)
    rows, columns = np.repeat(rows, copies), np.repeat(columns, copies)
    # The first copy ends the edge from the left. Its vertical edge is the one with which the pixels are joined.
    swapped = second ^ (nw & touching)[rows, columns]
    order = np.lexsort((swapped, rows, columns))
    vertical = np.empty(len(rows), np.int64)
    vertical[order[0::2]], vertical[order[1::2]] = order[1::2], order[0::2]
    partners, ring_of = vertical.tolist(), [-1] * len(rows)
    found: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}
    region_of_ring: list[int] = []
    keys = rows * padded.shape[1] + columns
    for start in range(0, len(rows), 2):
        if ring_of[start] >= 0:
            continue
        number, walk, corner = len(region_of_ring), [], start
        while ring_of[corner] < 0:
            ring_of[corner] = ring_of[corner ^ 1] = number
            walk += [corner, corner ^ 1]
            corner = partners[corner ^ 1]
        ring = np.stack([columns[walk], rows[walk]], axis=1)
        column, row = ring[0].tolist()
        if padded[row + 1, column + 1]:
            found[number] = ring, []
            region_of_ring.append(number)
            continue
        # A hole: the region's edge above it is of a ring that is known already.
        above = row - int(np.argmin(padded[row::-1, column + 1]))
        edge = int(np.searchsorted(keys, above * padded.shape[1] + column, side="right")) - 1
        region_of_ring.append(region_of_ring[ring_of[edge]])
        found[region_of_ring[number]][1].append(np.roll(ring[::-1], 1, axis=0))
    return list(found.values())


def _with_seams(outer: np.ndarray, holes: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon: at a corner that is near to a hole's first one the way goes to the hole, around it and back.

    It is the nearest one of the 512 corners that are nearest in the order of rows.
    """
    if not holes:
        return outer
    detours: dict[int, list[np.ndarray]] = {}
    order = np.lexsort((outer[:, 0], outer[:, 1]))
    rows = outer[order, 1]
    for hole in holes:
        place = int(np.searchsorted(rows, hole[0, 1]))
        candidates = order[max(place - 256, 0) : place + 256]
        nearest = int(candidates[np.square(outer[candidates] - hole[0]).sum(1).argmin()])
        detours.setdefault(nearest, []).extend([hole, hole[:1], outer[nearest : nearest + 1]])
    parts, done = [], 0
    for corner in sorted(detours):
        parts += [outer[done : corner + 1], *detours[corner]]
        done = corner + 1
    return np.concatenate([*parts, outer[done:]])


def contours(index: IndexMap) -> tuple[Int64[np.ndarray, " pixels"], Float32[np.ndarray, " pixels"]]:
    """Thin smooth lines between segments: flat places of their pixels, and how much of each they cover, 0 to 1.

    The lines are blurred by a Gaussian of 0.5 pixels. (As `cv2.GaussianBlur` does it, but for the last bit here and
    there; only pixels near a line are computed.)
    """
    edge = np.zeros(index.shape, bool)
    edge[:, 1:] = index[:, 1:] != index[:, :-1]
    edge[1:] |= index[1:] != index[:-1]
    thick = _dilate(edge, max(1, round(min(index.shape) / 480)))
    places = np.flatnonzero(_dilate(thick, 5))
    near = np.pad(thick.view(np.uint8), 2, mode="reflect")
    counts = near[:, 2:-2] + 2 * (near[:, 1:-3] + near[:, 3:-1]) + 6 * (near[:, :-4] + near[:, 4:])  # up to 17
    counts = counts.ravel()
    above2, above, here, below, below2 = (_ROW[counts[places + row * index.shape[1]]] for row in range(5))
    return places, _smooth(here, above + below, above2 + below2)


def _dilate(mask: Bool[np.ndarray, "height width"], width: int) -> Bool[np.ndarray, "height width"]:
    """The maximum over squares of a width, as `cv2.dilate` has it."""
    for axis in (0, 1):
        source, widened = mask.swapaxes(0, axis), mask.copy()
        result = widened.swapaxes(0, axis)
        for shift in range(1, width // 2 + 1):
            result[shift:] |= source[:-shift]
        for shift in range(1, (width - 1) // 2 + 1):
            result[:-shift] |= source[shift:]
        mask = widened
    return mask


def _smooth(here: np.ndarray, beside: np.ndarray, beyond: np.ndarray) -> Float32[np.ndarray, " pixels"]:
    """A weighted sum of five neighbours, rounded to float32 once per addition, as fused operations round."""
    middle, near, far = _KERNEL
    total = here * middle
    total = (beside.astype(np.float64) * near + total).astype(np.float32)
    return (beyond.astype(np.float64) * far + total).astype(np.float32)


_KERNEL = np.array([0.786570726, 0.106450772, 0.000263865083], np.float32)  # the sum of all five is 1
_ROW = _smooth(*(np.array(n, np.float32) for n in zip(*((i % 2, i // 2 % 3, i // 6) for i in range(18)), strict=True)))
"""Smoothed along a row, by the pixel itself + 2 x how many of its two neighbours + 6 x how many of the next two."""


class Middles:
    """The points of regions that are farthest from their outside.

    By OpenCV's distances along straight and diagonal steps. Without OpenCV the same ones are computed exactly, not in
    its rounded sums: of points that are equally far another one may be chosen.
    """

    _STRAIGHT, _DIAGONAL = 9550, 13693  # the lengths of steps that come nearest to true distances, in 1/10000 pixels

    def __init__(self, index: IndexMap) -> None:
        self.index = index
        self.distances = None if opencv() else self._distances()

    def of(self, i: int, region: Region) -> tuple[tuple[float, float], float]:
        """The middle of index i as (x, y), counted from its region's corner, and how far it is from the outside."""
        mask = self.index[region.window] == i
        if self.distances is None:
            cv2 = opencv()
            padded = cv2.copyMakeBorder(mask.view(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
            distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
        else:
            distance = np.where(mask, self.distances[region.window], 0) / 10_000
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        return (float(x), float(y)), float(distance[y, x])

    def _distances(self) -> Int32[np.ndarray, "height width"]:
        """Of every pixel to the nearest one of another index. (Borgefors, Distance transformations, 1986)

        One table serves all regions: a way that crosses another one is always longer than that to its border.
        """
        straight, diagonal, infinity = self._STRAIGHT, self._DIAGONAL, 2**30
        height, width = self.index.shape
        padded = np.pad(self.index.astype(np.int32), 1, constant_values=-1)

        def differs(down: int, right: int) -> Bool[np.ndarray, "height width"]:
            return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width] != self.index

        beside = differs(0, 1) | differs(0, -1) | differs(1, 0) | differs(-1, 0)
        corner = differs(1, 1) | differs(1, -1) | differs(-1, 1) | differs(-1, -1)
        table = np.full((height + 2, width + 2), infinity, np.int32)
        table[1:-1, 1:-1] = np.where(beside, straight, np.where(corner, diagonal, infinity))
        along = np.arange(width, dtype=np.int32) * straight
        for view in (table, table[::-1, ::-1]):  # from the top left, then from the bottom right
            for before, row in zip(view[:-2], view[1:-1, 1:-1], strict=True):
                np.minimum(row, np.minimum(before[:-2], before[2:]) + diagonal, out=row)
                np.minimum(row, before[1:-1] + straight, out=row)
                row -= along
                np.minimum.accumulate(row, out=row)
                row += along
        return table[1:-1, 1:-1]
