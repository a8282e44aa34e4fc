"""A second forward pass of the same weights, made of operators that every runtime has, for any size.

The network's own forward is written for PyTorch's speed: strips of pixels, `embedding_bag`, the best match kept in a
loop. Traced, these become fixed to one size, or are refused. Here the same equations are written without a loop over
pixels and without a decision that depends on values. The input is uint8 RGB; normalisation and padding are part of the
graph, because a caller cannot pad correctly: the network pads with 0 *after* normalising, which is no uint8 value.

Legend: B batch, Q queries, C channels, M heads, D channels of a head, H W spatial, P positions, K classes, T taps (9).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from pem_lightning.inference.optimize import fuse_batch_norms
from pem_lightning.models.ablations import MaskedCrossAttention, MeanCrossAttention, WithoutInteraction
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.layers import pointwise, sine_position_encoding
from pem_lightning.models.mask2former_pixel_decoder import (
    MSDeformPixelDecoder,
    MultiScaleDeformableAttention,
    pixel_centres,
)
from pem_lightning.models.pem import PEM, SIZE_DIVISOR
from pem_lightning.models.prototype_attention import PrototypeCrossAttention
from pem_lightning.models.transformer_decoder import TransformerDecoder
from pem_lightning.preprocess import IMAGE_MEAN, IMAGE_STD
from pem_lightning.types import UserError

NEVER = -1e4
"""Similarity of what is not to be selected: far below any cosine, and finite in float16."""
LOWEST = -1e30
"""Below every mask logit."""


class ExportGraph(nn.Module):
    """The network for export.

    Args:
        network: is copied; its batch normalisations are fused.
        deform: how deformable operators sample: "gather" (basic operators), "grid_sample", or "operator" (one
            operator of the runtime's own, for convolutions).

    Raises:
        UserError: the network is no `PEM`, or `deform` is not offered for it.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, network: nn.Module, deform: str = "gather") -> None:
        super().__init__()
        if not isinstance(network, PEM):
            raise UserError(f"a network of type {type(network).__name__} cannot be exported: it is no PEM")
        if deform not in DEFORMABLE_CONVOLUTIONS:
            raise UserError(f"deform={deform}: choose auto, {', '.join(DEFORMABLE_CONVOLUTIONS)}")
        if deform == "operator" and isinstance(network.pixel_decoder, MSDeformPixelDecoder):
            raise UserError("deform=operator is for deformable convolutions, this network has attention: choose gather")
        self.network = cast(PEM, fuse_batch_norms(network).float())
        for module in self.network.modules():
            if isinstance(module, DeformableConv):
                module.kernel = DEFORMABLE_CONVOLUTIONS[deform]
        self.deform = deform
        mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD))[:, :, None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("scale", 1 / std, persistent=False)

    def forward(
        self, images: UInt8[Tensor, "B H W 3"]
    ) -> tuple[Float[Tensor, "B Q classes_and_none"], Float[Tensor, "B Q h w"]]:
        """Return class logits and mask logits, these at a quarter of the size padded to multiples of 32."""
        height, width = images.shape[1:3]
        x = (images.permute(0, 3, 1, 2).float() - self.mean) * self.scale
        x = F.pad(x, (0, _missing(width), 0, _missing(height)))
        features = self.network.backbone(x)
        decoder = self.network.pixel_decoder
        if isinstance(decoder, MSDeformPixelDecoder):
            mask_features, levels = _msdeform_pixel_decoder(decoder, features, self.deform)
        else:
            mask_features, levels = decoder(features)
        return _transformer_decoder(self.network.transformer_decoder, mask_features, levels)


def _missing(length: int) -> int:
    return (length + SIZE_DIVISOR - 1) // SIZE_DIVISOR * SIZE_DIVISOR - length


def _transformer_decoder(
    decoder: TransformerDecoder,
    mask_features: Float[Tensor, "B C_mask H W"],
    levels: Sequence[Float[Tensor, "B C _ _"]],
) -> tuple[Float[Tensor, "B Q classes_and_none"], Float[Tensor, "B Q H W"]]:
    """As `TransformerDecoder.forward` without auxiliary predictions."""
    B = mask_features.shape[0]
    inputs = [_project(decoder, i, level) for i, level in enumerate(levels[: len(decoder.input_projections)])]
    # Levels have strides 32, 16 and 8, the mask features 4.
    guides = [_shrink(mask_features, 8 >> i).flatten(2) for i in range(len(inputs))]  # B C_mask P
    queries = decoder.query_features.weight.expand(B, -1, -1)
    positions = decoder.query_positions.weight
    for i, layer in enumerate(decoder.layers):
        level = i % len(inputs)
        mask_logits = None
        if decoder.masked:
            mask_logits = decoder.mask_head(decoder.norm(queries)) @ guides[level]  # B Q P
        queries = _cross_attention(layer.cross_attention, queries, positions, inputs[level], mask_logits)  # type: ignore[arg-type]
        queries = layer.feed_forward(layer.self_attention(queries, positions))  # type: ignore[operator]
    normed = decoder.norm(queries)
    masks = decoder.mask_head(normed) @ mask_features.flatten(2)
    return decoder.class_head(normed), masks.unflatten(2, mask_features.shape[2:])


def _project(decoder: TransformerDecoder, i: int, level: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C H W"]:
    x = decoder.input_projections[i](level) + decoder.level_embedding.weight[i : i + 1, :, None, None]
    return x if decoder.attention == "dot_product" else _with_positions(x)


def _with_positions(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    y_encoding, x_encoding = sine_position_encoding(x.shape[2], x.shape[3], x.shape[1], device=x.device)
    return x + y_encoding + x_encoding


def _shrink(x: Float[Tensor, "B C H W"], by: int) -> Float[Tensor, "B C _ _"]:
    """Bilinear resizing by 1/8, 1/4 or 1/2 is the mean of the four pixels in the middle of each cell.

    As a convolution it needs no slices, and every runtime keeps its memory format.
    """
    if by == 2:
        return F.avg_pool2d(x, 2)
    middle = slice(by // 2 - 1, by // 2 + 1)
    weight = torch.zeros(x.shape[1], 1, by, by, device=x.device)
    weight[:, :, middle, middle] = 0.25
    return F.conv2d(x, weight, stride=by, groups=x.shape[1])


def _cross_attention(
    attention: nn.Module,
    queries: Float[Tensor, "B Q C"],
    query_positions: Float[Tensor, "Q C"],
    features: Float[Tensor, "B C H W"],
    mask_logits: Float[Tensor, "B Q P"] | None,
) -> Float[Tensor, "B Q C"]:
    if isinstance(attention, MaskedCrossAttention):
        return _masked_cross_attention(attention, queries, query_positions, features, mask_logits)
    assert isinstance(attention, PrototypeCrossAttention)
    keys = attention.feature_conv(attention.feature_norm(features))
    keys = _unit_columns(pointwise(attention.feature_linear, keys).flatten(2))  # B C P
    projected = _unit(attention.query_linear(attention.query_norm(queries + query_positions)), dim=2)
    select = _mean if isinstance(attention, MeanCrossAttention) else _prototypes
    prototypes = select(keys, projected, mask_logits, attention.selection.num_heads)
    if isinstance(attention, WithoutInteraction):
        return attention.output(prototypes) + queries
    interaction = _unit(attention.interaction(prototypes * projected), dim=1)
    return attention.output(interaction * attention.alpha + prototypes) + queries


def _unit(x: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape"]:
    """`F.normalize` in basic operators."""
    return x * (x * x).sum(dim, keepdim=True).clamp(min=1e-24).rsqrt()


def _unit_columns(x: Float[Tensor, "B C P"]) -> Float[Tensor, "B C P"]:
    """`_unit` along the channels; a product sums over them several times as fast as ONNX Runtime's ReduceSum."""
    squares = torch.ones(1, x.shape[1], device=x.device) @ (x * x)
    return x * squares.clamp(min=1e-24).rsqrt()


def _prototypes(
    keys: Float[Tensor, "B C P"],
    queries: Float[Tensor, "B Q C"],
    mask_logits: Float[Tensor, "B Q P"] | None,
    heads: int,
) -> Float[Tensor, "B Q C"]:
    """As `PrototypeSelection`: an image whose masks are all empty is not masked; an empty mask takes position 0.

    The first of equal ones wins, so what is not to be selected shares one value.
    """
    keys = keys.unflatten(1, (heads, -1))  # B M D P
    similarity = queries.unflatten(2, (heads, -1)).transpose(1, 2) @ keys  # B M Q P
    if mask_logits is not None:
        lowest = torch.where(mask_logits.amax((1, 2), keepdim=True) < 0, LOWEST, 0.0)
        highest = torch.where(mask_logits < lowest, NEVER, -NEVER)[:, None]
        similarity = torch.minimum(similarity, highest)  # faster than `where` over all heads
    positions = similarity.argmax(-1)  # B M Q
    found = keys.gather(3, positions[:, :, None].expand(-1, -1, keys.shape[2], -1))  # B M D Q
    return found.flatten(1, 2).transpose(1, 2)


def _mean(
    keys: Float[Tensor, "B C P"],
    queries: Float[Tensor, "B Q C"],
    mask_logits: Float[Tensor, "B Q P"] | None,
    heads: int,
) -> Float[Tensor, "B Q C"]:
    """As `MeanCrossAttention.select`."""
    if mask_logits is None:
        return keys.mean(2)[:, None].expand_as(queries)
    foreground = _foreground(mask_logits).to(keys.dtype)
    return foreground @ keys.transpose(1, 2) / foreground.sum(2, keepdim=True)


def _foreground(mask_logits: Float[Tensor, "B Q P"]) -> Tensor:
    """Positions inside each query's mask, all of them if it is empty."""
    return mask_logits >= torch.where(mask_logits.amax(2, keepdim=True) < 0, LOWEST, 0.0)


def _masked_cross_attention(
    attention: MaskedCrossAttention,
    queries: Float[Tensor, "B Q C"],
    query_positions: Float[Tensor, "Q C"],
    features: Float[Tensor, "B C H W"],
    mask_logits: Float[Tensor, "B Q P"] | None,
) -> Float[Tensor, "B Q C"]:
    def heads(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M D P"]:
        return x.flatten(2).unflatten(1, (attention.num_heads, -1))

    keys = heads(pointwise(attention.key_linear, _with_positions(features)))
    values = heads(pointwise(attention.value_linear, features))
    projected = attention.query_linear(attention.query_norm(queries + query_positions))
    projected = projected.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)  # B M Q D
    weights = projected @ keys / math.sqrt(keys.shape[2])
    if mask_logits is not None:
        weights = torch.where(_foreground(mask_logits)[:, None], weights, LOWEST)
    out = weights.softmax(-1) @ values.transpose(2, 3)
    return attention.output(out.transpose(1, 2).flatten(2)) + queries


def _sample(
    padded: Float[Tensor, "B padded_H padded_W C"],
    y: Float[Tensor, "B *samples"],
    x: Float[Tensor, "B *samples"],
    weight: Float[Tensor, "B *samples"],
) -> Float[Tensor, "rows C"]:
    """Sample bilinearly, at pixels counted without the border of zeros, which stands for all that is outside."""
    B, H, W, C = padded.shape
    images = (torch.arange(B, device=y.device) * (H * W)).view(-1, *[1] * (y.ndim - 1))
    return _sample_table(padded.reshape(-1, C), images, (H, W), 1, y, x, weight)


def _sample_table(
    table: Float[Tensor, "rows C"],
    first: Int64[Tensor, "..."],
    size: tuple[int, int],
    step: int,
    y: Float[Tensor, "*samples"],
    x: Float[Tensor, "*samples"],
    weight: Float[Tensor, "*samples"],
) -> Float[Tensor, "samples C"]:
    """`_sample` from a table whose rows are the pixels of padded maps; pixel (0, 0) of a sample's map is row `first`.

    `step` rows lie between neighbouring pixels of a map.
    """
    H, W = size
    y, x = y.clamp(-2, H - 1), x.clamp(-2, W - 1)  # farther away, the conversion to integers is undefined
    y0, x0 = y.floor(), x.floor()
    fy, fx = y - y0, x - x0
    top = (y0 + 1).clamp(0, H - 1).long() * W
    bottom = (y0 + 2).clamp(0, H - 1).long() * W
    left = (x0 + 1).clamp(0, W - 1).long()
    right = (x0 + 2).clamp(0, W - 1).long()
    out = None
    for rows, row_weight in ((top, (1 - fy) * weight), (bottom, fy * weight)):
        for columns, column_weight in ((left, 1 - fx), (right, fx)):
            index = (rows + columns) * step + first
            part = table.index_select(0, index.flatten()) * (row_weight * column_weight).flatten()[:, None]
            out = part if out is None else out + part
    assert out is not None
    return out


def _taps(H: int, W: int, device: torch.device) -> tuple[Float[Tensor, "T H 1"], Float[Tensor, "T 1 W"]]:
    """Where the taps of a 3x3 convolution lie without offsets."""
    around = torch.arange(-1, 2, device=device, dtype=torch.float32)
    rows = torch.arange(H, device=device, dtype=torch.float32)[:, None]
    columns = torch.arange(W, device=device, dtype=torch.float32)
    return rows + around.repeat_interleave(3)[:, None, None], columns + around.repeat(3)[:, None, None]


def deform_conv_gather(
    x: Float[Tensor, "B C_in H W"],
    offsets: Float[Tensor, "B two_T H W"],
    mask: Float[Tensor, "B T H W"],
    weight: Float[Tensor, "C_out C_in 3 3"],
) -> Float[Tensor, "B C_out H W"]:
    """The modulated deformable convolution by looking up rows of a table, a row of taps at once."""
    B, _, H, W = x.shape
    rows, columns = _taps(H, W, x.device)
    y, xs = offsets[:, 0::2] + rows, offsets[:, 1::2] + columns  # B T H W
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    out = None
    for tap in range(0, 9, TAPS_AT_ONCE):
        part = slice(tap, tap + TAPS_AT_ONCE)
        samples = _sample(padded, *(t[:, part].permute(0, 2, 3, 1) for t in (y, xs, mask)))
        flat = weight.flatten(2)[:, :, part].permute(2, 1, 0).flatten(0, 1)  # taps * C_in, C_out
        term = samples.view(B, H * W, flat.shape[0]) @ flat
        out = term if out is None else out + term
    assert out is not None
    return out.transpose(1, 2).unflatten(2, (H, W))


TAPS_AT_ONCE = 3
"""Taps whose samples are held at once."""


def deform_conv_grid_sample(
    x: Float[Tensor, "B C_in H W"],
    offsets: Float[Tensor, "B two_T H W"],
    mask: Float[Tensor, "B T H W"],
    weight: Float[Tensor, "C_out C_in 3 3"],
) -> Float[Tensor, "B C_out H W"]:
    """The same by one `grid_sample` of all taps, one below the other, and a 1x1 convolution."""
    _, C, H, W = x.shape
    rows, columns = _taps(H, W, x.device)
    y = (offsets[:, 0::2] + rows + 0.5) * (2 / H) - 1
    xs = (offsets[:, 1::2] + columns + 0.5) * (2 / W) - 1
    grid = torch.stack((xs, y), dim=-1).flatten(1, 2)  # B T*H W 2
    samples = F.grid_sample(x, grid, align_corners=False).unflatten(2, (9, H)) * mask[:, None]  # B C T H W
    return F.conv2d(samples.flatten(1, 2), weight.reshape(weight.shape[0], 9 * C, 1, 1))


@torch.library.custom_op(
    "pem::deform_conv",
    mutates_args=(),
    schema="(Tensor x, Tensor offsets, Tensor mask, Tensor weight) -> Tensor",  # jaxtyping hides it in tests
)
def deform_conv_operator(x: Tensor, offsets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The same as one operator, which the exported file names DeformConv."""
    return deform_conv_gather(x, offsets, mask, weight).contiguous()


@deform_conv_operator.register_fake
def _(x: Tensor, offsets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])


DEFORMABLE_CONVOLUTIONS: dict[str, Callable[..., Any]] = {
    "gather": deform_conv_gather,
    "grid_sample": deform_conv_grid_sample,
    "operator": deform_conv_operator,
}


def _msdeform_pixel_decoder(
    decoder: MSDeformPixelDecoder, features: Sequence[Float[Tensor, "B _ _ _"]], deform: str
) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
    """As `MSDeformPixelDecoder.forward`."""
    inputs = [project(x) for project, x in zip(decoder.input_projections, features[:0:-1], strict=True)]
    sizes = [(x.shape[2], x.shape[3]) for x in inputs]
    x = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], dim=1)
    encodings = [
        _with_positions(torch.zeros_like(one[:1])).flatten(2).transpose(1, 2) + embedding
        for one, embedding in zip(inputs, decoder.level_embedding.weight, strict=True)
    ]
    positions, references = torch.cat(encodings, dim=1), pixel_centres(sizes, device=x.device)
    for layer in decoder.layers:
        attended = _deformable_attention(layer.attention, x + positions, references, x, sizes, deform)  # type: ignore[arg-type]
        x = layer.attention_norm(x + attended)  # type: ignore[operator]
        x = layer.feed_forward_norm(x + layer.linear2(F.relu(layer.linear1(x))))  # type: ignore[operator]
    levels, start = [], 0
    for height, width in sizes:
        levels.append(x[:, start : start + height * width].transpose(1, 2).unflatten(2, (height, width)))
        start += height * width
    upsampled = F.interpolate(levels[-1], scale_factor=2.0, mode="bilinear", align_corners=False)
    return decoder.mask_projection(F.relu(decoder.output(decoder.lateral(features[0]) + upsampled))), levels


def _deformable_attention(
    attention: MultiScaleDeformableAttention,
    queries: Float[Tensor, "B S C"],
    references: Float[Tensor, "S 2"],
    features: Float[Tensor, "B S C"],
    sizes: Sequence[tuple[int, int]],
    deform: str,
) -> Float[Tensor, "B S C"]:
    """As `MultiScaleDeformableAttention.forward`, level by level."""
    M, L, P = attention.num_heads, attention.num_levels, attention.num_points
    offsets = attention.offsets(queries).unflatten(2, (M, L, P, 2))
    weights = attention.weights(queries).unflatten(2, (M, L * P)).softmax(-1).unflatten(3, (L, P))
    values = attention.values(features).unflatten(2, (M, -1))  # B S M D
    B, S = queries.shape[:2]
    D = values.shape[3]
    total, start = None, 0
    for level, (H, W) in enumerate(sizes):
        here = values[:, start : start + H * W]
        x = offsets[..., level, :, 0] + (references[:, 0] * W - 0.5)[:, None, None]  # B S M P
        y = offsets[..., level, :, 1] + (references[:, 1] * H - 0.5)[:, None, None]
        if deform == "grid_sample":
            maps = here.permute(0, 2, 3, 1).reshape(B * M, D, H, W)
            grid = torch.stack(((x + 0.5) * (2 / W) - 1, (y + 0.5) * (2 / H) - 1), dim=-1)
            grid = grid.transpose(1, 2).reshape(B * M, S, P, 2)
            samples = F.grid_sample(maps, grid, align_corners=False).view(B, M, D, S, P).permute(0, 3, 1, 4, 2)
            samples = samples * weights[..., level, :, None]
        else:
            padded = F.pad(here.view(B, H, W, M * D), (0, 0, 1, 1, 1, 1))
            images = torch.arange(B, device=x.device).view(-1, 1, 1, 1) * ((H + 2) * (W + 2) * M)
            first = images + torch.arange(M, device=x.device)[:, None]
            table, size = padded.reshape(-1, D), (H + 2, W + 2)
            samples = _sample_table(table, first, size, M, y, x, weights[..., level, :]).view(B, S, M, P, D)
        term = samples.sum(3)
        total = term if total is None else total + term
        start += H * W
    assert total is not None
    return attention.output(total.flatten(2))
