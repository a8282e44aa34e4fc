"""Mask2Former's pixel decoder (Cheng et al., CVPR 2022), which PEM's ablations compare with PEM's own.

An encoder of multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, equation 3) over strides 32,
16 and 8: with p_q the reference point of query q and x^l the features of level l, sampled bilinearly and 0 outside,

    y_q = sum_m  W_m  sum_l sum_p  A_mlqp  W'_m x^l(p_q + offset_mlqp)        sum_l sum_p A_mlqp = 1

Legend: B batch, C channels, H W spatial, S positions of all levels, Q queries, M heads, D channels of a head, L levels,
P points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pem_lightning.models.deformable_conv import (
    Kernel,
    KernelByName,
    at_least_float32,
    choose_kernel,
    require_cuda_build,
)
from pem_lightning.models.layers import projection, sine_position_encoding
from pem_lightning.types import UserError

NUM_LEVELS = 3  # strides 32, 16 and 8
NORM_GROUPS = 32
QUERIES_AT_ONCE = 2048
"""Queries sampled at once without gradients (6 MiB of rows and weights at 8 heads)."""

Sizes = Sequence[tuple[int, int]]
"""Height and width of every level."""


class MSDeformPixelDecoder(nn.Module):
    """Backbone features -> features for the masks (stride 4) and for the transformer decoder (32, 16, 8).

    Takes the place of `PixelDecoder`. Padding is not masked, as in Mask2Former's inference.

    Raises:
        UserError: the channels are no multiple of 32.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        mask_channels: int,
        kernel: str = "auto",
        *,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        hidden_channels: int = 1024,
    ) -> None:
        super().__init__()
        if channels % NORM_GROUPS:
            raise UserError(f"pyramid_channels={channels}: this pixel decoder needs a multiple of {NORM_GROUPS}")
        self.channels = channels
        # All lists run from the coarsest level to the finest.
        self.input_projections = nn.ModuleList(
            _conv_norm(c, channels, 1, bias=True) for c in in_channels[: -NUM_LEVELS - 1 : -1]
        )
        self.level_embedding = nn.Embedding(NUM_LEVELS, channels)
        self.layers = nn.ModuleList(
            MSDeformEncoderLayer(channels, num_heads, num_points, hidden_channels, kernel) for _ in range(num_layers)
        )
        self.lateral = _conv_norm(in_channels[0], channels, 1)
        self.output = _conv_norm(channels, channels, 3)
        self.mask_projection = projection(channels, mask_channels)

    def forward(
        self, features: list[Float[Tensor, "B _ _ _"]]
    ) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
        """Return mask features of stride 4, and the levels of strides 32, 16 and 8."""
        coarse_to_fine = features[: -NUM_LEVELS - 1 : -1]
        inputs = [project(x) for project, x in zip(self.input_projections, coarse_to_fine, strict=True)]
        sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], dim=1)
        positions = self._positions(sizes, x)
        references = pixel_centres(sizes, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, positions, references, sizes)
        parts = x.split([height * width for height, width in sizes], dim=1)
        levels = [part.transpose(1, 2).unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
        lateral = self.lateral(features[0])
        upsampled = F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(F.relu(self.output(lateral + upsampled), inplace=True)), levels

    def _positions(self, sizes: Sizes, like: Tensor) -> Float[Tensor, "S C"]:
        """Sine encoding of the place plus the level's embedding."""
        encodings = []
        for (height, width), level in zip(sizes, self.level_embedding.weight, strict=True):
            y, x = sine_position_encoding(height, width, self.channels, device=like.device)
            encodings.append((y + x).flatten(1).T.to(like.dtype) + level)
        return torch.cat(encodings)


class MSDeformEncoderLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward, each normalised afterwards; no dropout."""

    def __init__(self, channels: int, num_heads: int, num_points: int, hidden_channels: int, kernel: str) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention(channels, num_heads, NUM_LEVELS, num_points, kernel)
        self.attention_norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        self.feed_forward_norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self, x: Float[Tensor, "B S C"], positions: Float[Tensor, "S C"], references: Float[Tensor, "S 2"], sizes: Sizes
    ) -> Float[Tensor, "B S C"]:
        """Update every position; the values carry no position encoding."""
        x = self.attention_norm(x + self.attention(x + positions, references, x, sizes))
        hidden = F.relu(self.linear1(x), inplace=True)
        return self.feed_forward_norm(x + self.linear2(hidden))


class MultiScaleDeformableAttention(KernelByName):
    """Attention to a few points of every level around each query's reference point.

    Starts with uniform attention to points at 1, 2, ... pixels from it, each head in its own direction.
    """

    def __init__(self, channels: int, num_heads: int, num_levels: int, num_points: int, kernel: str = "auto") -> None:
        super().__init__(get_kernel, kernel)
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.values = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.values, self.output):
            nn.init.xavier_uniform_(layer.weight)
        for zero in (self.values.bias, self.output.bias, self.offsets.weight, self.weights.weight, self.weights.bias):
            nn.init.zeros_(zero)
        angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)  # to the border of a square
        bias = directions[:, None, None] * torch.arange(1, num_points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, num_levels, -1, -1).flatten())

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        references: Float[Tensor, "Q 2"],
        features: Float[Tensor, "B S C"],
        sizes: Sizes,
    ) -> Float[Tensor, "B Q C"]:
        """Attend; `references` are (x, y) from 0 to 1 over the whole map, at least float32."""
        heads = (self.num_heads, self.num_levels, self.num_points)
        extents = _constant(tuple((width, height) for height, width in sizes), torch.int64, queries.device)
        offsets = self.offsets(queries).unflatten(2, (*heads, 2)).to(references.dtype) / extents[:, None]
        weights = self.weights(queries).unflatten(2, (heads[0], -1)).softmax(dim=-1).unflatten(3, heads[1:])
        values = self.values(features).unflatten(2, (self.num_heads, -1))
        return self.output(self.kernel(values, sizes, references[:, None, None, None] + offsets, weights))


@cache
def get_kernel(name: str) -> Kernel:
    """Look up a kernel of the attention: "torch", "mmcv" or "auto"; see `choose_kernel`."""
    return choose_kernel("deformable attention", name, ms_deform_attn_torch, {"mmcv": _mmcv_kernel})


def ms_deform_attn_torch(
    values: Float[Tensor, "B S M D"],
    sizes: Sizes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Compute the operator in plain PyTorch; `locations` are (x, y) from 0 to 1 over the whole map.

    A head of a query is one bag of `embedding_bag` with the four corners of L x P samples, rows of `values`.
    """
    B, S, M, D = values.shape
    table, locations, weights = at_least_float32(values, locations, weights)
    table = table.reshape(B * S * M, D)
    # Without gradients on a CPU, strips of queries, whose rows and weights stay in its caches.
    whole = torch.is_grad_enabled() or values.is_cuda
    length = max(locations.shape[1], 1) if whole else QUERIES_AT_ONCE
    strips = []
    for points, point_weights in zip(locations.split(length, dim=1), weights.split(length, dim=1), strict=True):
        rows, row_weights = _corners(points, point_weights, sizes, S)
        samples = F.embedding_bag(rows, table, per_sample_weights=row_weights, mode="sum")
        strips.append(samples.view(B, -1, M * D).to(values.dtype))
    return torch.cat(strips, dim=1)


def _corners(
    locations: Float[Tensor, "B Q M L P 2"], weights: Float[Tensor, "B Q M L P"], sizes: Sizes, S: int
) -> tuple[Int[Tensor, "bags rows"], Float[Tensor, "bags rows"]]:
    """Rows of the table and their weights, attention times bilinear (0 outside the map), of every sample's corners.

    A bag is one head of one query, ordered batch, query, head.
    """
    B, _, M, _, P, _ = locations.shape
    device, integer = locations.device, torch.int32 if B * S * M < 2**31 else torch.int64

    def per_point(per_level: Iterable[Sequence[int]]) -> Int[Tensor, "points _"]:
        return _constant(tuple(per_level), integer, device).repeat_interleave(P, dim=0)

    # For every point of every level, x and y in the last axis:
    extent = per_point((width, height) for height, width in sizes).to(locations.dtype)
    steps = per_point((M, width * M) for _, width in sizes)
    starts = accumulate((height * width for height, width in sizes[:-1]), initial=0)
    heads = torch.arange(M, device=device, dtype=integer)[:, None]
    images = torch.arange(B, device=device, dtype=integer).view(B, 1, 1, 1) * (S * M)
    first_rows = per_point((start * M,) for start in starts)[:, 0] + heads + images

    points = locations.flatten(3, 4) * extent - 0.5
    # Nothing is read beyond these. NaN stays in the fraction and comes out as NaN, not as an index error.
    points = points.clamp(torch.full_like(extent, -1), extent)
    low = points.detach().floor().minimum(extent - 1).nan_to_num()
    fraction = points - low
    low_weights, high_weights = (1 - fraction) * (low >= 0), fraction * (low < extent - 1)
    low_rows = low.clamp(min=0).to(integer) * steps
    high_rows = (low + 1).minimum(extent - 1).to(integer) * steps

    attention = weights.flatten(3, 4)
    rows, row_weights = [], []
    for y_rows, y_weights in ((low_rows[..., 1], low_weights[..., 1]), (high_rows[..., 1], high_weights[..., 1])):
        y_rows, y_weights = y_rows + first_rows, y_weights * attention
        for x_rows, x_weights in ((low_rows[..., 0], low_weights[..., 0]), (high_rows[..., 0], high_weights[..., 0])):
            rows.append(y_rows + x_rows)
            row_weights.append(y_weights * x_weights)
    return torch.stack(rows, -1).flatten(3).flatten(0, 2), torch.stack(row_weights, -1).flatten(3).flatten(0, 2)


def _mmcv_kernel(device: str) -> Kernel:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    require_cuda_build(device)

    def kernel(values: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
        levels = _constant(tuple(sizes), torch.int64, values.device)
        with torch.autocast(values.device.type, enabled=False):
            arguments = [t.contiguous() for t in at_least_float32(values, locations, weights)]
            if not values.is_cuda:  # mmcv's operator is for GPUs only
                return multi_scale_deformable_attn_pytorch(arguments[0], levels, *arguments[1:]).to(values.dtype)
            areas = levels.prod(1)
            starts = areas.cumsum(0) - areas
            out = MultiScaleDeformableAttnFunction.apply(arguments[0], levels, starts, *arguments[1:], len(values))
            return out.to(values.dtype)

    return kernel


@lru_cache(maxsize=64)
def _constant(rows: tuple[Sequence[int], ...], dtype: torch.dtype, device: torch.device) -> Int[Tensor, "levels _"]:
    """A table of the levels, copied to a device once, because the copy makes the host wait."""
    return torch.tensor(rows, dtype=dtype, device=device)


def pixel_centres(
    sizes: Sizes, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, "S 2"]:
    """(x, y) of the positions of all levels, from 0 to 1 over the whole map."""

    def centres(length: int) -> Float[Tensor, " length"]:
        return (torch.arange(length, device=device, dtype=dtype) + 0.5) / length

    grids = [torch.meshgrid(centres(height), centres(width), indexing="ij") for height, width in sizes]
    return torch.cat([torch.stack((x, y), dim=-1).flatten(0, 1) for y, x in grids])


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = False) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    if conv.bias is None:
        nn.init.kaiming_uniform_(conv.weight, a=1)
    else:
        nn.init.xavier_uniform_(conv.weight)
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, out_channels))
