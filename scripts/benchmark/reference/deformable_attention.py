"""Multi-scale deformable attention as Deformable DETR defines it, on PyTorch's own bilinear sampling.

Legend: B batch, Q queries, S positions of all levels, M heads, D channels of a head, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def ms_deform_attn(
    values: Float[Tensor, "B S M D"],
    sizes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B Q M L P 2"],
    weights: Float[Tensor, "B Q M L P"],
) -> Float[Tensor, "B Q M*D"]:
    """Sample level by level, then weigh and add; for the arguments see `ms_deform_attn_torch`."""
    B, _, M, D = values.shape
    levels = values.split([height * width for height, width in sizes], dim=1)
    out = values.new_zeros(())
    for i, (level, (height, width)) in enumerate(zip(levels, sizes, strict=True)):
        maps = level.permute(0, 2, 3, 1).reshape(B * M, D, height, width)
        grid = (2 * locations[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)  # [B*M, Q, P, 2]
        samples = F.grid_sample(maps, grid, align_corners=False).unflatten(0, (B, M))  # [B, M, D, Q, P]
        out = out + torch.einsum("bmdqp,bqmp->bqmd", samples, weights[:, :, :, i])
    return out.flatten(2)
