"""Reading feature maps and masks at points, and choosing the points at which a mask loss is most informative.

Mask losses at a few thousand points instead of all pixels: PointRend (Kirillov et al., CVPR 2020) and
Mask2Former (Cheng et al., CVPR 2022, section 3.3).

Legend: N rows, C channels, H W spatial, P points. Points are (x, y) in [0, 1], (0, 0) being the outer corner of
the top left pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

UniformSource: TypeAlias = Callable[[tuple[int, ...], torch.device], Tensor]
"""Draws numbers uniform in [0, 1): takes a shape and a device."""


def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw from torch's global generator; every other `UniformSource` replaces this one."""
    return torch.rand(shape, device=device)


def sample_points(
    features: Float[Tensor, "rows channels height width"], points: Float[Tensor, "rows points 2"]
) -> Float[Tensor, "rows channels points"]:
    """Interpolate bilinearly at points; outside of the map lies zero.

    Args:
        features: one map per row.
        points: (x, y) in [0, 1].
    """
    grid = 2 * points[:, None] - 1
    return F.grid_sample(features, grid, align_corners=False).squeeze(2)


def sample_masks(
    masks: Bool[Tensor, "segments height width"],
    segments: Int64[Tensor, " rows"],
    points: Float[Tensor, "rows points 2"],
) -> Float[Tensor, "rows points"]:
    """`sample_points` for boolean masks, of which each row reads one.

    Reads four pixels per point where they lie. Turning full-resolution masks into floating point, or copying them in
    the order of the rows, would cost far more memory than all the rest of the losses.

    Args:
        masks: the masks that rows choose from.
        segments: which mask a row reads.
        points: (x, y) in [0, 1].
    """
    H, W = masks.shape[-2:]
    pixels = F.pad(masks, (1, 1, 1, 1)).flatten()  # a frame of zeros, so that every point has four neighbours
    x, y = points[..., 0] * W + 0.5, points[..., 1] * H + 0.5  # in the framed mask, whole numbers at pixel centres
    left, top = x.floor(), y.floor()
    right_share, bottom_share = x - left, y - top
    corner = (segments[:, None] * (H + 2) + top.long()) * (W + 2) + left.long()  # index into the flat pixels
    upper = torch.lerp(pixels[corner].to(x), pixels[corner + 1].to(x), right_share)
    lower = torch.lerp(pixels[corner + W + 2].to(x), pixels[corner + W + 3].to(x), right_share)
    return torch.lerp(upper, lower, bottom_share)


@torch.no_grad()
def choose_uncertain_points(
    logits: Float[Tensor, "rows height width"],
    num_points: int,
    *,
    oversample_ratio: float = 3.0,
    importance_sample_ratio: float = 0.75,
    rand: UniformSource = uniform,
) -> Float[Tensor, "rows points 2"]:
    """Choose points near the predicted masks' borders, and some anywhere (PointRend, section 3.1).

    Args:
        logits: one predicted mask per row; the closer to 0, the less certain.
        num_points: P, how many points a row gets.
        oversample_ratio: how many candidates per point are drawn, at least 1.
        importance_sample_ratio: share of the points that are the most uncertain candidates, 0 to 1. The others are
            drawn anew.
        rand: source of the draws: candidates `[N, int(P * oversample_ratio), 2]`, then the other points.

    Returns:
        (x, y) in [0, 1], the uncertain points first.
    """
    N = len(logits)
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates = rand((N, int(num_points * oversample_ratio), 2), logits.device)
    uncertainty = -sample_points(logits[:, None], candidates).squeeze(1).abs()
    best = uncertainty.topk(num_uncertain, dim=1, sorted=False).indices  # N P'
    uncertain = candidates.gather(1, best[..., None].expand(-1, -1, 2))  # N P' 2
    return torch.cat([uncertain, rand((N, num_points - num_uncertain, 2), logits.device)], dim=1)
