"""Reading masks at points, and choosing the points at which a mask loss is most informative.

Mask losses at a few thousand points instead of all pixels: PointRend (Kirillov et al., CVPR 2020) and Mask2Former
(Cheng et al., CVPR 2022, section 3.3).

Legend: N rows, C channels, H W spatial, P points. Points are (x, y) from 0 to 1; (0, 0) is the outer corner of the top
left pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

PIXELS_AT_ONCE = {"cpu": 2**20, "cuda": 2**25}
"""Pixels of masks turned into floating point at once: what a CPU's caches hold, 128 MiB of a GPU's memory."""

UniformSource: TypeAlias = Callable[[tuple[int, ...], torch.device], Tensor]
"""(shape, device) -> numbers uniform in [0, 1)."""


def uniform(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Draw by torch's global generator. On a CPU it only seeds one of NumPy's, which is three times as fast."""
    if device.type != "cpu":
        return torch.rand(shape, device=device)
    generator = np.random.Generator(np.random.SFC64(torch.randint(2**63 - 1, (1,)).numpy()))
    return torch.from_numpy(generator.random(shape, dtype=np.float32))


def sample_points(
    features: Float[Tensor, "rows channels height width"], points: Float[Tensor, "rows points 2"]
) -> Float[Tensor, "rows channels points"]:
    """Interpolate each row's map bilinearly at its points; outside the map is zero."""
    grid = (2 * points[:, None]).sub_(1)
    return F.grid_sample(features, grid, align_corners=False).squeeze(2)


def sample_masks(
    masks: Bool[Tensor, "segments height width"], points: Float[Tensor, "segments points 2"]
) -> Float[Tensor, "segments points"]:
    """Apply `sample_points` to boolean masks, a few at a time: all as floating point would fill the memory."""
    budget = PIXELS_AT_ONCE.get(masks.device.type, PIXELS_AT_ONCE["cuda"])
    at_once = max(1, budget // masks.shape[1:].numel())
    parts = zip(masks.split(at_once), points.split(at_once), strict=True)
    return torch.cat([sample_points(mask[:, None].to(points.dtype), where).squeeze(1) for mask, where in parts])


@torch.no_grad()
def choose_uncertain_points(
    logits: Float[Tensor, "rows height width"],
    num_points: int,
    oversample_ratio: float,
    importance_sample_ratio: float,
    rand: UniformSource,
) -> Float[Tensor, "rows points 2"]:
    """Choose P points near every predicted mask's border, then some anywhere (PointRend, section 3.1).

    Args:
        oversample_ratio: candidates per point, at least 1.
        importance_sample_ratio: share of points that are the most uncertain candidates (logits nearest 0).
        rand: draws the candidates `[N, int(P * oversample_ratio), 2]`, then the other points.
    """
    N = len(logits)
    num_uncertain = int(importance_sample_ratio * num_points)
    candidates = rand((N, int(num_points * oversample_ratio), 2), logits.device)
    certainty = sample_points(logits[:, None], candidates).squeeze(1).abs_()
    if certainty.device.type != "cpu" or num_uncertain == certainty.shape[1]:
        best = certainty.topk(num_uncertain, largest=False, sorted=False).indices  # N P'
    else:  # five times as fast
        best = torch.from_numpy(np.argpartition(certainty.numpy(), num_uncertain, axis=1)[:, :num_uncertain])
    uncertain = candidates.gather(1, best[..., None].expand(-1, -1, 2))  # N P' 2
    return torch.cat([uncertain, rand((N, num_points - num_uncertain, 2), logits.device)], dim=1)
