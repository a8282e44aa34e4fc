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
from jaxtyping import Bool, Float, Int32, Int64, Shaped
from torch import Tensor

STRIDE = 4
"""Pixels between two logits."""
MARGIN = 1e-5
"""Relative; float32 sums of a hundred numbers are exact to about 1e-6."""
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
        self.shape = ((self.height + 1) // STRIDE + 1, (self.width + 1) // STRIDE + 1)
        self.steps = (torch.arange(STRIDE, device=self.device, dtype=mask_logits.dtype) + 0.5) / STRIDE
        self.rows_inside, self.columns_inside = (
            self._inside(count, length) for count, length in zip(self.shape, image_size, strict=True)
        )

    def strips(self) -> Iterator[slice]:
        """Rows of cells, few enough at once for the caches of a CPU; on a GPU almost always all."""
        budget = _ELEMENTS_AT_ONCE.get(self.device.type, _ELEMENTS_AT_ONCE["cuda"])
        step = max(1, budget // (self.shape[1] * max(self.num_queries, 1)))
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
        budget = 4 * _ELEMENTS_AT_ONCE.get(self.device.type, _ELEMENTS_AT_ONCE["cuda"])
        step = max(1, budget // (STRIDE * STRIDE * max(self.num_queries, 1)))
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
