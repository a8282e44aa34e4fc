"""Looking inside the query decoder: which features a query chose as its prototypes, and how its mask came about.

Legend: Q queries, M heads, h w the grid of a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.inference.images import ImageLike, read_image
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.postprocess import Size
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.inference.task import size_of
from pem_lightning.networks.pem import padded_size
from pem_lightning.networks.recording import Selection, record_selections
from pem_lightning.networks.transformer_decoder import TransformerDecoder
from pem_lightning.types import Predictions


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
