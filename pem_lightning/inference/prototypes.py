"""Which features a query chose as its prototypes, and how its mask came about: recorded by hooks, then drawn.

Legend: B batch, Q queries, M heads, D channels of a head, P positions, h w the grid of a level.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor, nn

from pem_lightning.inference.fonts import load_font
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
"""Of queries; distinct also for colour-blind people."""
GREYNESS = 0.6
TINT = 0.4
GRID_OPACITY = 0.16
TEXT_SIZES = (10, 16)
"""Smallest and largest; between them half a cell."""


@dataclass(frozen=True)
class LayerPrototypes:
    """The prototypes of one image's queries in one layer (equations 2 and 3), on the CPU."""

    layer: int  # its number, from 1
    stride: int  # of the level that it looked at: 32, 16 or 8 pixels of the network's input
    cells: Int64[Tensor, "M Q 2"]  # row and column of every prototype in the level's grid
    cell_size: tuple[float, float]  # width and height of a cell of the grid in pixels of the image
    similarity: Float[Tensor, "M Q"]  # scalar product of one head's part of unit vectors
    masks: Bool[Tensor, "Q h w"]  # where a query could choose: in its mask so far, or anywhere if masking is off

    @property
    def positions(self) -> Float[Tensor, "M Q 2"]:
        """x and y of the centre of every prototype's cell, in pixels of the image or of the padding beyond it."""
        return (self.cells.flip(-1) + 0.5) * torch.tensor(self.cell_size)

    @property
    def empty(self) -> Bool[Tensor, " Q"]:
        """Queries without a choice: their mask is empty while another one in the image is not. Their cell is (0, 0)."""
        return ~self.masks.flatten(1).any(1)

    @property
    def num_distinct(self) -> Int64[Tensor, " Q"]:
        """Number of cells that a query's heads chose: 1 if all agree, M if none do."""
        ordered = (self.cells[..., 0] * self.masks.shape[2] + self.cells[..., 1]).sort(0).values  # M Q
        return 1 + (ordered[1:] != ordered[:-1]).sum(0)


@dataclass(frozen=True)
class DecoderTrace:
    """One image's queries on their way through the decoder, on the CPU."""

    image: UInt8[np.ndarray, "height width 3"]
    input_size: Size  # of the network's input, without padding
    layers: tuple[LayerPrototypes, ...]
    predictions: tuple[Predictions, ...]  # of the learned queries and after every layer, each a batch of one

    def masks_of(self, query: int) -> Float[Tensor, "steps height width"]:
        """A query's mask probabilities at the image's size, in each of the predictions."""
        logits = torch.stack([p.mask_logits[0, query] for p in self.predictions])[None].float()
        height, width = size_of(logits)
        padded = F.interpolate(logits, (4 * height, 4 * width), mode="bilinear")
        inside = padded[..., : self.input_size[0], : self.input_size[1]]
        return F.interpolate(inside, self.image.shape[:2], mode="bilinear")[0].sigmoid()

    def queries_of(self, result: SegmentedImage) -> dict[int, int]:
        """The query behind each segment of the same predictor's panoptic result, by segment id.

        It is the query of the segment's class whose mask has the highest IoU with it (stuff can come from several
        queries), at a quarter of the size, where a segment of few pixels can be missing.

        Raises:
            UserError: the result is not panoptic.
        """
        if result.panoptic is None:
            raise UserError("only panoptic results have segments with a query: make the predictor with task=panoptic")
        final = self.predictions[-1]
        height, width = (-(-side // 4) for side in self.input_size)
        masks = final.mask_logits[0, :, :height, :width] >= 0
        labels = final.class_logits[0].argmax(-1)
        ids = F.interpolate(result.panoptic[None, None].float(), (height, width), mode="nearest-exact")[0, 0]
        queries = {}
        for segment in result.segments:
            own = ids == segment.id
            iou = (masks & own).sum((1, 2)) / (masks | own).sum((1, 2)).clamp(min=1)
            iou[labels != segment.class_id] = 0
            if iou.max() > 0:
                queries[segment.id] = int(iou.argmax())
        return queries


@torch.no_grad()
def trace_decoder(predictor: Predictor, image: ImageLike) -> DecoderTrace:
    """Follow an image's queries through the decoder of a predictor's network, as it predicts.

    The predictor's task, classes, scales and flip have no effect here.

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
    mask_features: list[Tensor] = []
    choices: list[tuple[Tensor, Tensor, Tensor | None]] = []
    queries = [decoder.query_features.weight[None]]
    grids: list[Size] = []

    def record_choice(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        _, projected_queries, background = inputs
        prototypes, positions = outputs
        products = (prototypes * projected_queries).float().unflatten(2, (positions.shape[1], -1))  # B Q M D
        choices.append((positions[0].cpu(), products.sum(-1).mT[0].cpu(), background))

    def record_layer(_: nn.Module, layer_inputs: tuple[Any, ...], output: Tensor) -> None:
        queries.append(output)
        grids.append(size_of(layer_inputs[2]))

    handles = [decoder.register_forward_pre_hook(lambda _, inputs: mask_features.append(inputs[0]))]
    handles += [m.register_forward_hook(record_choice) for m in decoder.modules() if isinstance(m, PrototypeSelection)]
    handles += [layer.register_forward_hook(record_layer) for layer in decoder.layers]
    try:
        model(inputs[None])
    finally:
        for handle in handles:
            handle.remove()
    if not choices:
        raise UserError(
            f"attention={decoder.attention} chooses no prototypes: train with ablation=prototype, the default"
        )
    layers = [
        _layer_prototypes(i, *choice, grid, size_of(inputs), photo.shape)
        for i, (choice, grid) in enumerate(zip(choices, grids, strict=True), start=1)
    ]
    predictions = [decoder.predict(q, mask_features[0]) for q in queries]
    predictions = [Predictions(p.class_logits.float().cpu(), p.mask_logits.float().cpu()) for p in predictions]
    return DecoderTrace(photo, size_of(inputs), tuple(layers), tuple(predictions))


def _layer_prototypes(
    layer: int,
    positions: Int64[Tensor, "M Q"],
    similarity: Float[Tensor, "M Q"],
    background: Bool[Tensor, "B Q P"] | None,
    grid: Size,
    input_size: Size,
    image_size: tuple[int, ...],
) -> LayerPrototypes:
    stride = padded_size(*input_size)[0] // grid[0]
    if background is None or background.all():
        masks = torch.ones(positions.shape[1], *grid, dtype=torch.bool)
    else:
        masks = ~background[0].cpu().unflatten(1, grid)
    return LayerPrototypes(
        layer=layer,
        stride=stride,
        cells=torch.stack((positions // grid[1], positions % grid[1]), dim=-1),
        cell_size=(stride * image_size[1] / input_size[1], stride * image_size[0] / input_size[0]),
        similarity=similarity,
        masks=masks,
    )


def draw_trace(
    trace: DecoderTrace,
    queries: Sequence[int],
    *,
    layers: Sequence[int] | None = None,
    scale: int = 1,
    per_row: int = 3,
) -> UInt8[np.ndarray, "_ _ 3"]:
    """`draw_prototypes` for some layers (their numbers, from 1) or all, `per_row` in a row under their titles."""
    chosen = [layer for layer in trace.layers if layers is None or layer.layer in layers]
    pictures = [draw_prototypes(trace.image, layer, queries, scale) for layer in chosen]
    titles = [f"layer {layer.layer}, stride {layer.stride}" for layer in chosen]
    starts = range(0, len(chosen), per_row)
    rows = [side_by_side(pictures[i : i + per_row], titles[i : i + per_row]) for i in starts]
    width = rows[0].shape[1]
    return np.concatenate(
        [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    )


def draw_prototypes(
    image: UInt8[np.ndarray, "height width 3"],
    layer: LayerPrototypes,
    queries: Sequence[int],
    scale: int = 1,
) -> UInt8[np.ndarray, "scaled_height scaled_width 3"]:
    """Draw the prototypes of some queries in one layer over the greyed image.

    The cells from which a query could choose are tinted in its colour, the prototypes' cells are framed, and a plate in
    each names the heads, from 1, that chose it. Queries that did not choose are left out. `scale` enlarges the picture;
    cells should have 30 pixels or more for the plates.
    """
    height, width = image.shape[0] * scale, image.shape[1] * scale
    photo = Image.fromarray(image).resize((width, height))
    canvas = np.array(Image.blend(photo, photo.convert("L").convert("RGB"), GREYNESS), np.float32)
    # Pixels where cells begin, and where the last one ends.
    cell_width, cell_height = layer.cell_size
    rows = (np.arange(layer.masks.shape[1] + 1) * (cell_height * scale)).round().astype(int)
    columns = (np.arange(layer.masks.shape[2] + 1) * (cell_width * scale)).round().astype(int)
    shown = [(q, COLORS[i % len(COLORS)]) for i, q in enumerate(queries) if not layer.empty[q]]
    for query, color in shown:
        mask = layer.masks[query].numpy().repeat(np.diff(rows), axis=0).repeat(np.diff(columns), axis=1)
        mask = mask[:height, :width]  # without the padding
        canvas[mask] = (1 - TINT) * canvas[mask] + TINT * np.array(color, np.float32)
    canvas[rows[(rows > 0) & (rows < height)]] *= 1 - GRID_OPACITY
    canvas[:, columns[(columns > 0) & (columns < width)]] *= 1 - GRID_OPACITY
    picture = Image.fromarray(canvas.round().astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    choices: dict[tuple[int, int], list[tuple[str, RGB]]] = defaultdict(list)
    for query, color in shown:
        heads: dict[tuple[int, int], list[str]] = defaultdict(list)
        for head, (row, column) in enumerate(layer.cells[:, query].tolist(), start=1):
            heads[row, column].append(str(head))
        for cell, numbers in heads.items():
            choices[cell].append((" ".join(numbers), color))
    font = load_font(float(np.clip(min(rows[1], columns[1]) / 2, *TEXT_SIZES)))
    for (row, column), plates in choices.items():
        box = (columns[column], rows[row], columns[column + 1] - 1, rows[row + 1] - 1)
        draw.rectangle(box, outline=plates[0][1], width=2)
    for (row, column), plates in choices.items():
        x, middle = (columns[column] + columns[column + 1]) / 2, (rows[row] + rows[row + 1]) / 2
        for i, (text, color) in enumerate(plates):
            y = middle + (i - (len(plates) - 1) / 2) * 1.3 * font.size
            half_width, half_height = font.getlength(text) / 2 + 0.4 * font.size, 0.65 * font.size
            box = (x - half_width, y - half_height, x + half_width, y + half_height)
            draw.rounded_rectangle(box, radius=0.4 * font.size, fill=color, outline=(255, 255, 255))
            draw.text((x, y), text, fill=(20, 20, 20), font=font, anchor="mm")
    return np.array(picture)
