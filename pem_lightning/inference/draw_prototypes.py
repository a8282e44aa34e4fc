"""Prototypes drawn over their photograph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont

from pem_lightning.inference.prototypes import DecoderTrace, LayerPrototypes
from pem_lightning.inference.visualize import RGB, side_by_side

COLORS: tuple[RGB, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (204, 80, 150),
    (0, 158, 115),
    (240, 228, 66),
    (213, 94, 0),
    (150, 110, 230),
    (170, 200, 60),
)
"""Told apart by colour-blind people, too; they repeat for more than eight queries."""
GREYNESS = 0.6
TINT = 0.4
GRID_OPACITY = 0.16
TEXT_SIZES = (10, 16)
"""Of the plates: half a cell, but neither illegible nor huge."""


def draw_prototypes(
    image: UInt8[np.ndarray, "height width 3"],
    layer: LayerPrototypes,
    queries: Sequence[int],
    *,
    scale: int = 1,
    colors: Sequence[RGB] = COLORS,
) -> UInt8[np.ndarray, "scaled_height scaled_width 3"]:
    """Draw what some queries chose in one layer.

    The photograph is greyed. Every query has a colour: the cells from which it could choose are tinted, the prototypes'
    cells are framed, and a plate in each names the heads, from 1, that chose it. A query whose mask is empty did not
    choose, and is left out.

    Args:
        image: that was traced, RGB.
        layer: of the trace.
        queries: which to draw.
        scale: enlarges the picture; cells should have 30 pixels or more for the plates.
        colors: of the queries, in turn.

    Returns:
        A new RGB image, `scale` times the size.
    """
    height, width = image.shape[0] * scale, image.shape[1] * scale
    photo = Image.fromarray(image).resize((width, height))
    canvas = np.array(Image.blend(photo, photo.convert("L").convert("RGB"), GREYNESS), np.float32)
    columns, rows = (_edges(layer, axis, scale) for axis in (1, 0))
    shown = [(q, colors[i % len(colors)]) for i, q in enumerate(queries) if not layer.empty[q]]
    for query, color in shown:
        mask = _enlarge(layer.masks[query].numpy(), rows, columns, (height, width))
        canvas[mask] = (1 - TINT) * canvas[mask] + TINT * np.array(color, np.float32)
    canvas[rows[(rows > 0) & (rows < height)]] *= 1 - GRID_OPACITY
    canvas[:, columns[(columns > 0) & (columns < width)]] *= 1 - GRID_OPACITY
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    _draw_choices(ImageDraw.Draw(picture), layer, shown, rows, columns)
    return np.array(picture)


def draw_trace(
    trace: DecoderTrace,
    queries: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    scale: int = 1,
    colors: Sequence[RGB] = COLORS,
    per_row: int = 3,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """Draw what some queries chose, layer after layer under their titles.

    Args:
        trace: of the image.
        queries: as of `draw_prototypes`, and so are `scale` and `colors`.
        layers: their numbers, from 1, at least one; None draws all.
        scale: of every picture.
        colors: of the queries.
        per_row: so many layers stand in a row.
    """
    chosen = [layer for layer in trace.layers if layers is None or layer.layer in layers]
    pictures = [draw_prototypes(trace.image, layer, queries, scale=scale, colors=colors) for layer in chosen]
    titles = [f"layer {layer.layer}, stride {layer.stride}" for layer in chosen]
    starts = range(0, len(chosen), per_row)
    rows = [side_by_side(pictures[i : i + per_row], titles[i : i + per_row]) for i in starts]
    sheet = np.full((sum(map(len, rows)), rows[0].shape[1], 3), 255, np.uint8)
    top = 0
    for row in rows:
        sheet[top : top + len(row), : row.shape[1]] = row
        top += len(row)
    return sheet


def _edges(layer: LayerPrototypes, axis: int, scale: int) -> np.ndarray:
    """Where cells begin in the enlarged picture, and the last one ends: rows for axis 0, columns for axis 1."""
    step = layer.cell_size[1 - axis] * scale
    return (np.arange(layer.masks.shape[1 + axis] + 1) * step).round().astype(int)


def _enlarge(
    cells: Bool[np.ndarray, "h w"], rows: np.ndarray, columns: np.ndarray, size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """Cells as pixels of the enlarged picture; those in the padding are cut off."""
    return cells.repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)[: size[0], : size[1]]


def _draw_choices(
    draw: ImageDraw.ImageDraw,
    layer: LayerPrototypes,
    shown: Sequence[tuple[int, RGB]],
    rows: np.ndarray,
    columns: np.ndarray,
) -> None:
    """Frames around the chosen cells, then a plate per query with the numbers of the heads, above each other."""
    choices: dict[tuple[int, int], list[tuple[str, RGB]]] = defaultdict(list)
    for query, color in shown:
        heads: dict[tuple[int, int], list[int]] = defaultdict(list)
        for head, (row, column) in enumerate(layer.cells[:, query].tolist(), start=1):
            heads[row, column].append(head)
        for cell, numbers in heads.items():
            choices[cell].append((" ".join(map(str, numbers)), color))
    font = ImageFont.load_default(float(np.clip(min(rows[1], columns[1]) / 2, *TEXT_SIZES)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # what Pillow returns when a size is given
    for (row, column), plates in choices.items():
        box = (columns[column], rows[row], columns[column + 1] - 1, rows[row + 1] - 1)
        draw.rectangle(box, outline=plates[0][1], width=2)
    for (row, column), plates in choices.items():
        middle = (columns[column] + columns[column + 1]) / 2, (rows[row] + rows[row + 1]) / 2
        for i, (text, color) in enumerate(plates):
            _draw_plate(draw, font, text, color, (middle[0], middle[1] + (i - (len(plates) - 1) / 2) * 1.3 * font.size))


def _draw_plate(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont,
    text: str,
    color: RGB,
    center: tuple[float, float],
) -> None:
    half_width, half_height = font.getlength(text) / 2 + 0.4 * font.size, 0.65 * font.size
    box = (center[0] - half_width, center[1] - half_height, center[0] + half_width, center[1] + half_height)
    draw.rounded_rectangle(box, radius=0.4 * font.size, fill=color, outline=(255, 255, 255))
    draw.text(center, text, fill=(20, 20, 20), font=font, anchor="mm")
