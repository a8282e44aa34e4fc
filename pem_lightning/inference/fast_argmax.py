"""The winner at every pixel, exactly as if all pixels were computed, from bounds on groups of pixels.

Masks are upsampled bilinearly by 4, so the 4 x 4 pixels between four neighbouring logits, a *cell*, lie between the
smallest and the largest of these four. Where the bounds already decide the winner, two sigmoids per mask decide 16
pixels. Only the other cells, mostly along contours, are computed pixel by pixel. The bounds keep a margin for rounding.

Legend: Q queries, K classes, h w logits of a mask, R S rows and columns of cells, N chosen cells.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int32, Int64, Shaped
from torch import Tensor

STRIDE = 4
"""Pixels between two logits."""
MARGIN = 1e-5
"""Relative; float32 sums of a hundred numbers are exact to about 1e-6."""
SLACK = 0.03
"""Queries that together add less than this to the score of every class are computed only where it matters."""
_ELEMENTS_AT_ONCE = {"cpu": 2**18, "cuda": 2**27}


class Cells:
    """All cells of an image: its size comes without the padding, which is at the right and the bottom.

    Cell (i, j) holds the pixels of rows 4i - 2 to 4i + 1 and columns 4j - 2 to 4j + 1; cells at the border hold fewer.
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
        """Smallest and largest logit that a pixel of each cell can have."""
        rows = torch.arange(strip.start, strip.stop + 1, device=self.device)
        columns = torch.arange(self.shape[1] + 1, device=self.device)
        # Beyond the map, its first and last row and column are repeated.
        corners = self.table[(rows - 1).clamp(0, self.h - 1)][:, (columns - 1).clamp(0, self.w - 1)]
        low = torch.minimum(corners[:, :-1], corners[:, 1:])
        high = torch.maximum(corners[:, :-1], corners[:, 1:])
        return torch.minimum(low[:-1], low[1:]), torch.maximum(high[:-1], high[1:])

    def areas(self, strip: slice) -> Int64[Tensor, "R S"]:
        """Pixels of the image in each cell: 16, or fewer at the border."""
        return self.rows_inside[strip].sum(1)[:, None] * self.columns_inside.sum(1)

    def pixels(
        self, rows: Int64[Tensor, " N"], columns: Int64[Tensor, " N"]
    ) -> Iterator[tuple[slice, Float[Tensor, "_ four four Q"], Bool[Tensor, "_ four four"]]]:
        """Logits of the chosen cells' pixels, and which pixels lie in the image; some of the N cells at once."""
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
        """An empty map of all cells' pixels."""
        return torch.empty(self.shape[0], STRIDE, self.shape[1], STRIDE, dtype=torch.int32, device=self.device)

    def crop(self, canvas: Shaped[Tensor, "rows 4 columns 4"]) -> Shaped[Tensor, "H W"]:
        """The image's part of a canvas."""
        half = STRIDE // 2
        full = canvas.view(STRIDE * self.shape[0], STRIDE * self.shape[1])
        return full[half : half + self.height, half : half + self.width].contiguous()

    def _inside(self, count: int, length: int) -> Bool[Tensor, "count 4"]:
        pixels = torch.arange(STRIDE * count, device=self.device).view(count, STRIDE) - STRIDE // 2
        return (pixels >= 0) & (pixels < length)


def fast_class_map(
    weights: Float[Tensor, "Q K"], mask_logits: Float[Tensor, "Q h w"], image_size: tuple[int, int]
) -> Int32[Tensor, "H W"]:
    """The class with the highest score, the sum over queries of class probability times mask probability.

    A class wins a whole cell if its score at the lowest logits beats those of all others at the highest. Queries of
    small weight count with all that they could add; they are computed only where that leaves the winner open.

    `weights` are class probabilities.
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
    """The queries to compute first, and how much the others can add to each class at most.

    The lightest queries are left out as long as together they stay below `SLACK` in every class.
    """
    order = weights.amax(1).argsort()
    total = weights[order].cumsum(0)  # Q K
    light = order[total.amax(1) < SLACK]
    if len(light) < len(weights) / 4:  # too few to be worth a second look
        light = light[:0]
    heavy = torch.ones(len(weights), dtype=torch.bool, device=weights.device)
    heavy[light] = False
    return heavy, weights[light].sum(0)


def fast_winner_map(
    mask_logits: Float[Tensor, "Q h w"], scores: Float[Tensor, " Q"], image_size: tuple[int, int]
) -> tuple[Int32[Tensor, "H W"], Int64[Tensor, "Q 3"]]:
    """The query with the highest score (class probability) times mask probability.

    A cell is decided at once if its winner is certain and no mask's contour crosses it.

    Returns:
        The winner's index, Q where the pixel is outside the winner's own mask (probability below 0.5); and per query
        the pixels it wins, the pixels of its own mask, and the pixels that are both.
    """
    Q = len(mask_logits)
    cells = Cells(mask_logits, image_size)
    canvas = cells.canvas()
    areas = torch.zeros(Q, 3, dtype=torch.int64, device=cells.device)
    for strip in cells.strips():
        low, high = cells.bounds(strip)
        full, crossed = low >= 0, (low < 0) & (high > -MARGIN)
        winner, certain = _certain_winner(low.sigmoid_().mul_(scores), high.sigmoid_().mul_(scores))  # R S
        decided = certain & ~crossed.any(-1)
        visible = full.gather(-1, winner[..., None]).squeeze(-1)
        canvas[strip] = torch.where(visible, winner, Q)[:, None, :, None].int()
        rows, columns = torch.nonzero(~decided, as_tuple=True)
        _count(areas, winner, visible, full, cells.areas(strip) * decided)
        rows += strip.start
        for part, logits, inside in cells.pixels(rows, columns):
            probability = logits.sigmoid_()
            own = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
            winner = (probability * scores).argmax(-1)
            visible = own.gather(-1, winner[..., None]).squeeze(-1)
            canvas[rows[part], :, columns[part]] = torch.where(visible, winner, Q).int()
            _count(areas, winner, visible, own, inside.long())
    return cells.crop(canvas), areas


def _certain_winner(
    low: Float[Tensor, "*places Q"], high: Float[Tensor, "*places Q"]
) -> tuple[Int64[Tensor, "*places"], Bool[Tensor, "*places"]]:
    """The highest lower bound, and whether it is above all others' upper bounds. Overwrites `high`."""
    best, winner = low.max(-1)
    rest = high.scatter_(-1, winner[..., None], -1.0).amax(-1)
    return winner, best > rest * (1 + MARGIN) + MARGIN * MARGIN


def _count(
    areas: Int64[Tensor, "Q 3"],
    winner: Int64[Tensor, "*places"],
    visible: Bool[Tensor, "*places"],
    own: Bool[Tensor, "*places Q"],
    pixels: Int64[Tensor, "*places"],
) -> None:
    """Add pixels won, pixels in the own mask and pixels of both to the areas of every query."""
    Q = len(areas)
    places = (winner * 2 + visible).flatten()
    # In float64 sums of counts are exact.
    won = torch.bincount(places, pixels.flatten().double(), minlength=2 * Q).view(Q, 2)
    areas[:, 0] += won.sum(1).long()
    areas[:, 1] += (pixels.flatten().double() @ own.flatten(0, -2).double()).long()
    areas[:, 2] += won[:, 1].long()
