"""Looking inside the query decoder: which features a query chose as its prototypes, and how its mask came about.

Legend: Q queries, M heads, h w the grid of a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.postprocess import Size, size_of
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.inference.sources import ImageLike, read_image
from pem_lightning.inference.visualize import RGB, side_by_side
from pem_lightning.models.pem import padded_size
from pem_lightning.models.prototype_attention import PrototypeSelection
from pem_lightning.models.transformer_decoder import TransformerDecoder
from pem_lightning.types import Predictions, UserError


@dataclass(frozen=True)
class LayerPrototypes:
    """What the queries of one image chose in one layer (equations 2 and 3). Tensors are on the CPU.

    Attributes:
        layer: its number, from 1.
        stride: of the level that it looked at: 32, 16 or 8 pixels of what the network saw.
        cells: row and column of every prototype in the level's grid.
        cell_size: width and height of a cell of the grid in pixels of the image.
        similarity: of every prototype and its query: a scalar product of one head's part of unit vectors.
        masks: the cells from which a query could choose: its mask so far, or all where masking is off.
    """

    layer: int
    stride: int
    cells: Int64[Tensor, "M Q 2"]
    cell_size: tuple[float, float]
    similarity: Float[Tensor, "M Q"]
    masks: Bool[Tensor, "Q h w"]

    @property
    def positions(self) -> Float[Tensor, "M Q 2"]:
        """x and y of the middle of every prototype's cell, in pixels of the image.

        Its top left corner is (0, 0). The level covers the padding, too, so a prototype may lie right of or below it.
        """
        return (self.cells.flip(-1) + 0.5) * torch.tensor(self.cell_size)

    @property
    def empty(self) -> Bool[Tensor, " Q"]:
        """Queries whose mask is empty, but not all others': they did not choose, and their prototype is cell (0, 0)."""
        return ~self.masks.flatten(1).any(1)

    @property
    def num_distinct(self) -> Int64[Tensor, " Q"]:
        """On how many cells a query's heads fell: 1 where all of them agree, M where none do."""
        ordered = (self.cells[..., 0] * self.masks.shape[2] + self.cells[..., 1]).sort(0).values  # M Q
        return 1 + (ordered[1:] != ordered[:-1]).sum(0)


@dataclass(frozen=True)
class DecoderTrace:
    """The way of one image's queries through the decoder. Tensors are on the CPU.

    Attributes:
        image: the photograph, RGB.
        input_size: height and width at which the network saw it, without padding.
        layers: prototypes, layer after layer.
        predictions: of the learned queries and after every layer, each a batch of one.
    """

    image: UInt8[np.ndarray, "height width 3"]
    input_size: Size
    layers: tuple[LayerPrototypes, ...]
    predictions: tuple[Predictions, ...]

    def masks_of(self, query: int) -> Float[Tensor, "steps height width"]:
        """A query's mask at the image's size, as probabilities, in each of the predictions."""
        logits = torch.stack([p.mask_logits[0, query] for p in self.predictions])[None].float()
        quarter_height, quarter_width = size_of(logits)
        padded = F.interpolate(logits, (4 * quarter_height, 4 * quarter_width), mode="bilinear")
        seen = padded[..., : self.input_size[0], : self.input_size[1]]
        return F.interpolate(seen, self.image.shape[:2], mode="bilinear")[0].sigmoid()

    def queries_of(self, result: SegmentedImage) -> dict[int, int]:
        """The query behind every panoptic segment of the same predictor's result.

        That is, of the queries of the segment's class, the one whose mask has the highest IoU with it (stuff can be
        made from several). Compared at a quarter of the size, at which a segment of few pixels can be missing.

        Returns:
            Segment id -> query.

        Raises:
            UserError: the result has no segments' map, because its task is another.
        """
        if result.panoptic is None:
            raise UserError("only panoptic results have segments with a query: make the predictor with task=panoptic")
        final = self.predictions[-1]
        height, width = (-(-side // 4) for side in self.input_size)
        masks = final.mask_logits[0, :, :height, :width] >= 0
        labels = final.class_logits[0].argmax(-1)
        ids = F.interpolate(result.panoptic[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
        found = {}
        for segment in result.segments:
            mine = ids == segment.id
            iou = (masks & mine).sum((1, 2)) / (masks | mine).sum((1, 2)).clamp(min=1)
            iou[labels != segment.class_id] = 0
            if iou.max() > 0:
                found[segment.id] = int(iou.argmax())
        return found


@torch.no_grad()
def trace_decoder(predictor: Predictor, image: ImageLike) -> DecoderTrace:
    """Follow an image's queries through the decoder of a predictor's network, on the way that predictions take, too.

    Args:
        predictor: its task, classes, scales and flips do not matter here: the network sees the image once, as it is.
        image: as of `Predictor`.

    Raises:
        UserError: the image cannot be read; the network is compiled, or its layers choose no prototypes.
    """
    model = predictor.model
    if isinstance(model, OptimizedNetwork) and model.compile_mode is not None:
        raise UserError("a compiled network cannot be looked into: make the predictor with compile=None")
    decoder = next((m for m in model.modules() if isinstance(m, TransformerDecoder)), None)
    if decoder is None:
        raise UserError(f"{type(model).__name__} has no transformer decoder to look into: give a predictor of PEM")
    photo = read_image(image)
    inputs = predictor.prepare(photo)
    with record_selections(model) as selections, _record_queries(decoder) as seen:
        model(inputs[None])
    if len(selections) < len(decoder.layers):
        raise UserError(
            f"attention={decoder.attention} chooses no prototypes: train with ablation=prototype, the default"
        )
    layers = [
        _describe(i, selection, grid, size_of(inputs), (photo.shape[0], photo.shape[1]))
        for i, (selection, grid) in enumerate(zip(selections, seen.grids, strict=True), start=1)
    ]
    predictions = [decoder.predict(queries, seen.mask_features) for queries in seen.queries]
    predictions = [Predictions(p.class_logits.float().cpu(), p.mask_logits.float().cpu()) for p in predictions]
    return DecoderTrace(photo, size_of(inputs), tuple(layers), tuple(predictions))


class _Seen:
    """What passes through a decoder: queries before the first layer and after every one, and the levels' grids."""

    def __init__(self, queries: Tensor) -> None:
        self.mask_features = queries
        self.queries = [queries]
        self.grids: list[Size] = []


@contextmanager
def _record_queries(decoder: TransformerDecoder) -> Iterator[_Seen]:
    seen = _Seen(decoder.query_features.weight[None])

    def begin(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.mask_features = inputs[0]

    def step(_: nn.Module, inputs: tuple[Any, ...], queries: Tensor) -> None:
        seen.queries.append(queries)
        seen.grids.append(size_of(inputs[2]))

    handles = [decoder.register_forward_pre_hook(begin)]
    handles += [layer.register_forward_hook(step) for layer in decoder.layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _describe(layer: int, selection: Selection, grid: Size, input_size: Size, image_size: Size) -> LayerPrototypes:
    """A layer's choice in one image, in terms of that image."""
    positions = selection.positions[0].cpu()  # M Q
    stride = padded_size(*input_size)[0] // grid[0]
    if selection.background is None or selection.background.all():
        masks = torch.ones(positions.shape[1], *grid, dtype=torch.bool)
    else:
        masks = ~selection.background[0].cpu().unflatten(1, grid)
    return LayerPrototypes(
        layer=layer,
        stride=stride,
        cells=torch.stack((positions // grid[1], positions % grid[1]), dim=-1),
        cell_size=(stride * image_size[1] / input_size[1], stride * image_size[0] / input_size[0]),
        similarity=selection.similarity[0].cpu(),
        masks=masks,
    )


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


# Watching which prototypes a network chooses, without changing what it computes.
#
# Legend: B batch, Q queries, M heads, D channels of a head, P positions.


class Selection(NamedTuple):
    """One layer's choice, as `select_prototypes` made it.

    Attributes:
        positions: of the prototypes.
        similarity: of every prototype and its query: the product that was the highest of all positions.
        background: where a query could not choose; None without masking.
    """

    positions: Int64[Tensor, "B M Q"]
    similarity: Float[Tensor, "B M Q"]
    background: Bool[Tensor, "B Q P"] | None


@contextmanager
def record_selections(network: nn.Module) -> Iterator[list[Selection]]:
    """Fill a list with every layer's choice of prototypes while the context is open.

    It stays empty for a network that chooses none. A compiled network cannot be looked into.
    """
    selections: list[Selection] = []

    def see(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        _, queries, background = inputs
        prototypes, positions = outputs
        products = (prototypes * queries).float().unflatten(2, (positions.shape[1], -1))  # B Q M D
        selections.append(Selection(positions, products.sum(-1).mT, background))

    handles = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, PrototypeSelection)]
    try:
        yield selections
    finally:
        for handle in handles:
            handle.remove()
