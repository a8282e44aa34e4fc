"""Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021, equation 3): one module, several kernels.

Every head m of a query q looks at P points of each of the L levels. With p_q its reference point, x^l the level's
features and bilinear sampling that reads 0 outside,

    y_q = sum_m  W_m  sum_l sum_p  A_mlqp  W'_m x^l(p_q + offset_mlqp)        sum_l sum_p A_mlqp = 1

The default kernel is plain PyTorch and runs everywhere.

Legend: B batch, Q queries, S positions of all levels, M heads, D channels of a head, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.networks.kernels import Kernels, at_least_float32, require_cuda_build

Sizes = Sequence[tuple[int, int]]
"""Height and width of every level, in the order of their positions."""

Kernel = Callable[[Tensor, Sizes, Tensor, Tensor], Tensor]
"""(values, sizes, locations, weights) -> output; see `ms_deform_attn_torch`."""

QUERIES_AT_ONCE = 2048
"""How many queries are sampled at once where no gradient is wanted (6 MiB of rows and weights at 8 heads)."""


def ms_deform_attn_torch(
    values: Float[Tensor, "B S M D"],
    sizes: Sizes,
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """The operator in plain PyTorch, exact with all gradients.

    A head of a query is a weighted sum of L x P samples, and each of them of four corners: one bag of `embedding_bag`
    with 4 L P rows of `values`, which needs no transposition, because a row is a position's head.

    Args:
        values: every level's positions row by row, one level after the other.
        sizes: of the levels.
        locations: (x, y), 0 to 1 from the map's left or upper border to the opposite one.
        weights: of the points.
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
    """Rows of the table and their weights, attention times bilinear, of the four corners of every sample.

    A bag is one head of one query, ordered batch, query, head. A corner outside the map keeps a valid row and gets
    weight 0.
    """
    B, _, M, _, P, _ = locations.shape
    device, integer = locations.device, torch.int32 if B * S * M < 2**31 else torch.int64

    def per_point(per_level: Iterable[Sequence[int]]) -> Int[Tensor, "points _"]:
        return _constant(tuple(per_level), integer, device).repeat_interleave(P, dim=0)

    # Of every point of every level, and in the last axis of x and y:
    extent = per_point((width, height) for height, width in sizes).to(locations.dtype)
    steps = per_point((M, width * M) for _, width in sizes)
    starts = accumulate((height * width for height, width in sizes[:-1]), initial=0)
    heads = torch.arange(M, device=device, dtype=integer)[:, None]
    images = torch.arange(B, device=device, dtype=integer).view(B, 1, 1, 1) * (S * M)
    first_rows = per_point((start * M,) for start in starts)[:, 0] + heads + images

    points = locations.flatten(3, 4) * extent - 0.5
    # Beyond these nothing is read. A NaN must come out as NaN and not as an index error: it stays in the fraction.
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


@lru_cache(maxsize=64)
def _constant(rows: tuple[Sequence[int], ...], dtype: torch.dtype, device: torch.device) -> Int[Tensor, "levels _"]:
    """A table of the levels, copied to a device once, because the copy makes the host wait."""
    return torch.tensor(rows, dtype=dtype, device=device)


def _mmcv_kernel(device: str) -> Kernel:
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    require_cuda_build(device)

    def kernel(values: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> Tensor:
        levels = _constant(tuple(sizes), torch.int64, values.device)
        with torch.autocast(values.device.type, enabled=False):
            arguments = [t.contiguous() for t in at_least_float32(values, locations, weights)]
            if not values.is_cuda:  # mmcv has no operator for CPUs, only this
                return multi_scale_deformable_attn_pytorch(arguments[0], levels, *arguments[1:]).to(values.dtype)
            areas = levels.prod(1)
            starts = areas.cumsum(0) - areas
            out = MultiScaleDeformableAttnFunction.apply(arguments[0], levels, starts, *arguments[1:], len(values))
            return out.to(values.dtype)

    return kernel


_KERNELS = Kernels(
    "deformable attention",
    plain=ms_deform_attn_torch,
    others={"mmcv": _mmcv_kernel},
    # The CPU's order is measured (`scripts/benchmark.py --kernels`). CUDA's is not: mmcv's is one fused kernel, and who
    # has built mmcv for a GPU has built it for this.
    fastest={"cpu": ("torch",), "cuda": ("mmcv", "torch")},
)


@cache
def get_kernel(name: str) -> Kernel:
    """Look up a kernel: "torch", "mmcv", or "auto" (the fastest that is installed for the device of the values).

    Raises:
        UserError: the name is unknown, or its library cannot be loaded.
    """
    return _KERNELS.get(name)


def pixel_centres(
    sizes: Sizes, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Float[Tensor, "S 2"]:
    """(x, y) of every level's positions, 0 to 1 from the map's left or upper border to the opposite one."""

    def centres(length: int) -> Float[Tensor, " length"]:
        return (torch.arange(length, device=device, dtype=dtype) + 0.5) / length

    grids = [torch.meshgrid(centres(height), centres(width), indexing="ij") for height, width in sizes]
    return torch.cat([torch.stack((x, y), dim=-1).flatten(0, 1) for y, x in grids])


class MultiScaleDeformableAttention(nn.Module):
    """Attention to a few points of every level, which every query chooses around its reference point.

    Starts with uniform attention to points at 1, 2, ... pixels from the reference, each head in its own direction.

    Args:
        channels: of queries, values and output.
        num_heads: M.
        num_levels: L.
        num_points: P.
        kernel: see `get_kernel`.

    Raises:
        UserError: the channels cannot be shared out to the heads, or the kernel is unknown or not installed.
    """

    def __init__(
        self, channels: int = 256, num_heads: int = 8, num_levels: int = 3, num_points: int = 4, kernel: str = "auto"
    ) -> None:
        super().__init__()
        if channels % num_heads:
            raise UserError(f"{channels} channels cannot be shared out to {num_heads} heads: choose a multiple of them")
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.offsets = nn.Linear(channels, num_heads * num_levels * num_points * 2)
        self.weights = nn.Linear(channels, num_heads * num_levels * num_points)
        self.values = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        self.kernel = get_kernel(kernel)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial weights as Deformable DETR and Mask2Former do."""
        for layer in (self.values, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.offsets, self.weights):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.weights.bias)
        angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions = directions / directions.abs().amax(dim=1, keepdim=True)  # to the border of a square
        distances = torch.arange(1, self.num_points + 1)
        bias = directions[:, None, None] * distances[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(bias.expand(-1, self.num_levels, -1, -1).flatten())

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        references: Float[Tensor, "Q 2"],
        features: Float[Tensor, "B S C"],
        sizes: Sizes,
    ) -> Float[Tensor, "B Q C"]:
        """Attend.

        Args:
            queries: decide where to look, and how much to take from there.
            references: (x, y) of every query, 0 to 1 from the map's left or upper border to the opposite one. At least
                float32, whatever the rest is.
            features: every level's positions row by row, one level after the other.
            sizes: of the levels.
        """
        heads = (self.num_heads, self.num_levels, self.num_points)
        extents = _constant(tuple((width, height) for height, width in sizes), torch.int64, queries.device)
        offsets = self.offsets(queries).unflatten(2, (*heads, 2)).to(references.dtype) / extents[:, None]
        weights = self.weights(queries).unflatten(2, (heads[0], -1)).softmax(dim=-1).unflatten(3, heads[1:])
        values = self.values(features).unflatten(2, (self.num_heads, -1))
        return self.output(self.kernel(values, sizes, references[:, None, None, None] + offsets, weights))
