"""Cells: the pixels between four neighbouring logits of a mask, decided together wherever their winner is certain.

Masks are upsampled bilinearly by 4, so the 4 x 4 pixels between four neighbouring logits lie between their smallest
and their largest, in every mask. Where these bounds already say who wins, all 16 pixels are decided by two sigmoids per
mask instead of 16, and nothing is interpolated; only the other cells, mostly along contours, are computed pixel by
pixel. The bounds keep a margin for rounding, so the answer is that of computing every pixel.

Legend: Q queries, h w logits of a mask, R rows of a strip of cells, S cells in a row, N chosen cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64, Shaped
from torch import Tensor

STRIDE = 4
"""Pixels between two logits."""
MARGIN = 1e-5
"""Relative; float32 sums of a hundred numbers are exact to about 1e-6."""
SLACK = 0.03
"""Queries that together cannot add more than this to the score of any class are looked at last."""
_ELEMENTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}


class Cells:
    """All cells that hold pixels of an image.

    Cell (i, j) holds the pixels of rows 4i - 2 to 4i + 1 and columns 4j - 2 to 4j + 1; cells at the border hold fewer.

    Args:
        mask_logits: at a quarter of the padded size.
        image_size: height and width of the image, whose padding is at the right and the bottom.
    """

    def __init__(self, mask_logits: Float[Tensor, "Q h w"], image_size: tuple[int, int]) -> None:
        self.num_queries, self.h, self.w = mask_logits.shape
        self.height, self.width = image_size
        self.table = mask_logits.permute(1, 2, 0).contiguous()  # h w Q
        self.device = mask_logits.device
        self.elements_at_once = _ELEMENTS_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"]
        self.shape = ((self.height + 1) // STRIDE + 1, (self.width + 1) // STRIDE + 1)
        self.steps = (torch.arange(STRIDE, device=self.device, dtype=mask_logits.dtype) + 0.5) / STRIDE
        self.rows_inside, self.columns_inside = (
            self._inside(count, length) for count, length in zip(self.shape, image_size, strict=True)
        )

    def strips(self) -> Iterator[slice]:
        """Rows of cells, few enough at once for the caches of a CPU; on a GPU almost always all."""
        step = max(1, self.elements_at_once // (self.shape[1] * max(self.num_queries, 1)))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def bounds(self, strip: slice) -> tuple[Float[Tensor, "R S Q"], Float[Tensor, "R S Q"]]:
        """Smallest and largest logit that a pixel of every cell can have."""
        corners = self._corner_rows(torch.arange(strip.start, strip.stop + 1, device=self.device))
        low = torch.minimum(corners[:, :-1], corners[:, 1:])
        high = torch.maximum(corners[:, :-1], corners[:, 1:])
        return torch.minimum(low[:-1], low[1:]), torch.maximum(high[:-1], high[1:])

    def areas(self, strip: slice) -> Int64[Tensor, "R S"]:
        """How many pixels of the image every cell holds, 16 but at the border."""
        return self.rows_inside[strip].sum(1)[:, None] * self.columns_inside.sum(1)

    def pixels(
        self, rows: Int64[Tensor, " N"], columns: Int64[Tensor, " N"]
    ) -> Iterator[tuple[slice, Float[Tensor, "_ four four Q"], Bool[Tensor, "_ four four"]]]:
        """Logits of the chosen cells' pixels, some cells at once, and which of the pixels lie in the image."""
        step = max(1, 4 * self.elements_at_once // (STRIDE * STRIDE * max(self.num_queries, 1)))
        weight = self.steps[:, None]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            i, j = rows[part], columns[part]
            above, below = (i - 1).clamp(min=0), i.clamp(max=self.h - 1)
            left, right = (j - 1).clamp(min=0), j.clamp(max=self.w - 1)
            at_left = torch.lerp(self.table[above, left][:, None], self.table[below, left][:, None], weight)
            at_right = torch.lerp(self.table[above, right][:, None], self.table[below, right][:, None], weight)
            logits = torch.lerp(at_left[:, :, None], at_right[:, :, None], weight)
            yield part, logits, self.rows_inside[i][:, :, None] & self.columns_inside[j][:, None, :]

    def canvas(self) -> Int32[Tensor, "rows 4 columns 4"]:
        """An empty map of all cells' pixels, to be filled by cell and cut by `crop`."""
        return torch.empty(self.shape[0], STRIDE, self.shape[1], STRIDE, dtype=torch.int32, device=self.device)

    def crop(self, canvas: Shaped[Tensor, "rows 4 columns 4"]) -> Shaped[Tensor, "H W"]:
        """The image's part of a canvas."""
        half = STRIDE // 2
        full = canvas.view(STRIDE * self.shape[0], STRIDE * self.shape[1])
        return full[half : half + self.height, half : half + self.width].contiguous()

    def _corner_rows(self, numbers: Int64[Tensor, " rows"]) -> Float[Tensor, "rows columns Q"]:
        """Rows of logits, the first and the last repeated beyond the map, and columns likewise."""
        rows = self.table[(numbers - 1).clamp(0, self.h - 1)]
        columns = (torch.arange(self.shape[1] + 1, device=self.device) - 1).clamp(0, self.w - 1)
        return rows[:, columns]

    def _inside(self, count: int, length: int) -> Bool[Tensor, "count 4"]:
        pixels = torch.arange(STRIDE * count, device=self.device).view(count, STRIDE) - STRIDE // 2
        return (pixels >= 0) & (pixels < length)


def class_map_by_cells(
    weights: Float[Tensor, "Q K"], mask_logits: Float[Tensor, "Q h w"], image_size: tuple[int, int]
) -> Int32[Tensor, "H W"]:
    """The class with the highest score at every pixel.

    A class is certain of a cell if its score at the lowest logits beats those of all others at the highest. Queries of
    small weight count with all that they could add; they are computed only where that leaves the winner open.

    Args:
        weights: probability of every class, by query.
        mask_logits: as of `Cells`.
        image_size: as of `Cells`.
    """
    heavy, slack = _heavy_queries(weights)
    everything = Cells(mask_logits, image_size)
    cells, weights_of_heavy = everything, weights
    if not heavy.all():
        cells, weights_of_heavy = Cells(mask_logits[heavy], image_size), weights[heavy]
    canvas = cells.canvas()
    for strip in cells.strips():
        low, high = cells.bounds(strip)
        lowest, highest = low.sigmoid_() @ weights_of_heavy, high.sigmoid_() @ weights_of_heavy
        winner, certain = _certain_winner(lowest, highest.add_(slack))  # R S
        canvas[strip] = winner[:, None, :, None]
        rows, columns = torch.nonzero(~certain, as_tuple=True)
        rows += strip.start
        for part, logits, inside in cells.pixels(rows, columns):
            scores = logits.sigmoid_() @ weights_of_heavy
            canvas[rows[part], :, columns[part]] = scores.argmax(-1).int()
            if cells is everything:  # nothing was left out
                continue
            _, certain = _certain_winner(scores, scores + slack)
            open_cells = (~certain & inside).flatten(1).any(1)
            i, j = rows[part][open_cells], columns[part][open_cells]
            for some, all_logits, _ in everything.pixels(i, j):
                canvas[i[some], :, j[some]] = (all_logits.sigmoid_() @ weights).argmax(-1).int()
    return cells.crop(canvas)


def _heavy_queries(weights: Float[Tensor, "Q K"]) -> tuple[Bool[Tensor, " Q"], Float[Tensor, " K"]]:
    """Which queries matter nearly everywhere, and how much the others can add to each class at most.

    As many as possible are light, the lightest first, as long as together they stay below `SLACK` in every class.
    """
    order = weights.amax(1).argsort()
    total = weights[order].cumsum(0)  # Q K
    light = order[total.amax(1) < SLACK]
    if len(light) < len(weights) / 4:  # too few to be worth a second look
        light = light[:0]
    heavy = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    heavy[light] = False
    return heavy, weights[light].sum(0)


def compete_by_cells(
    mask_logits: Float[Tensor, "M h w"], scores: Float[Tensor, " M"], image_size: tuple[int, int]
) -> tuple[Int32[Tensor, "H W"], Int64[Tensor, "M 3"]]:
    """The query with the highest score times mask probability at every pixel.

    A cell is decided if its winner is certain and the edge of no mask crosses it.

    Args:
        mask_logits: as of `Cells`.
        scores: of the queries.
        image_size: as of `Cells`.

    Returns:
        The winner's index per pixel, M where the pixel is outside the winner's own mask (probability below 0.5);
        and three areas per query: pixels it wins, pixels of its own mask, pixels of its own mask that it wins.
    """
    M = len(mask_logits)
    cells = Cells(mask_logits, image_size)
    canvas = cells.canvas()
    areas = torch.zeros(M, 3, dtype=torch.int64, device=cells.device)
    for strip in cells.strips():
        low, high = cells.bounds(strip)
        full, crossed = low >= 0, (low < 0) & (high > -MARGIN)
        winner, certain = _certain_winner(low.sigmoid_().mul_(scores), high.sigmoid_().mul_(scores))  # R S
        decided = certain & ~crossed.any(-1)
        visible = full.gather(-1, winner[..., None]).squeeze(-1)
        canvas[strip] = torch.where(visible, winner, M)[:, None, :, None].int()
        rows, columns = torch.nonzero(~decided, as_tuple=True)
        _count(areas, winner, visible, full, cells.areas(strip) * decided)
        rows += strip.start
        for part, logits, inside in cells.pixels(rows, columns):
            probability = logits.sigmoid_()
            own = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
            winner = (probability * scores).argmax(-1)
            visible = own.gather(-1, winner[..., None]).squeeze(-1)
            canvas[rows[part], :, columns[part]] = torch.where(visible, winner, M).int()
            _count(areas, winner, visible, own, inside.long())
    return cells.crop(canvas), areas


def _certain_winner(
    low: Float[Tensor, "*places M"], high: Float[Tensor, "*places M"]
) -> tuple[Int64[Tensor, "*places"], Bool[Tensor, "*places"]]:
    """Who has the highest lower bound, and whether it is above everybody else's upper bound. Overwrites `high`."""
    best, winner = low.max(-1)
    rest = high.scatter_(-1, winner[..., None], -1.0).amax(-1)
    return winner, best > rest * (1 + MARGIN) + MARGIN * MARGIN


def _count(
    areas: Int64[Tensor, "M 3"],
    winner: Int64[Tensor, "*places"],
    visible: Bool[Tensor, "*places"],
    own: Bool[Tensor, "*places M"],
    pixels: Int64[Tensor, "*places"],
) -> None:
    """Add pixels won, pixels in the own mask and pixels of both to the areas of every query."""
    M = len(areas)
    places = (winner * 2 + visible).flatten()
    # In float64 sums of counts are exact.
    won = torch.bincount(places, pixels.flatten().double(), minlength=2 * M).view(M, 2)
    areas[:, 0] += won.sum(1).long()
    areas[:, 1] += (pixels.flatten().double() @ own.flatten(0, -2).double()).long()
    areas[:, 2] += won[:, 1].long()


# Bilinear resizing of some rows of a map, equal to resizing the whole map and taking these rows.
#
# The rule is that of `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
#
# Legend: M maps, H W the source, R rows wanted.


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
