"""Cells partition the image, their bounds hold, and their pixels are those of bilinear upsampling.

That their winners are those of computing every pixel is tested against the reference algorithm.
"""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pem_lightning.inference import fast_argmax
from pem_lightning.inference.fast_argmax import Cells


def draw_cells(height, width, seed, queries=3):
    h, w = -(-height // 4), -(-width // 4)
    logits = torch.randn(queries, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = F.interpolate(logits[None], (4 * h, 4 * w), mode="bilinear", align_corners=False)[0]
    return Cells(logits, (height, width)), full[:, :height, :width]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 1000))
def test_cells_are_those_of_bilinear_upsampling(height, width, seed):
    cells, full = draw_cells(height, width, seed)
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in cells.shape), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    pixels, inside_canvas = cells.canvas().double(), cells.canvas()
    for part, logits, inside in cells.pixels(rows, columns):
        pixels[rows[part], :, columns[part]] = logits[..., 0]
        inside_canvas[rows[part], :, columns[part]] = inside.int()
    torch.testing.assert_close(cells.crop(pixels), full[0], rtol=0, atol=1e-12)
    assert cells.crop(inside_canvas).all()
    assert inside_canvas.sum() == height * width

    low, high, area = cells.canvas().double(), cells.canvas().double(), 0
    for strip in cells.strips():
        lows, highs = cells.bounds(strip)
        low[strip] = lows[..., 0][:, None, :, None]
        high[strip] = highs[..., 0][:, None, :, None]
        area += int(cells.areas(strip).sum())
    assert (cells.crop(low) <= full[0] + 1e-12).all()
    assert (cells.crop(high) >= full[0] - 1e-12).all()
    assert area == height * width


def test_strips_cover_all_rows_once(monkeypatch):
    monkeypatch.setitem(fast_argmax._ELEMENTS_AT_ONCE, "cpu", 70)
    cells, _ = draw_cells(33, 40, 0)
    strips = list(cells.strips())
    assert len(strips) > 1
    assert [row for strip in strips for row in range(strip.start, strip.stop)] == list(range(cells.shape[0]))
