"""PEM-CA: prototype-based masked cross-attention, the paper's contribution (section 3.2, figure 3).

Features inside a query's mask are much alike: PEM-CA keeps the one most similar to the query, its *prototype*, for
every query and head, and combines the two by an element-wise product.

Legend: B batch, Q queries, C channels, M heads, D channels of a head, H W spatial, P positions (H * W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pem_lightning.models.layers import pointwise

POSITIONS_AT_ONCE = 1024
"""Positions compared with all queries at once on a CPU, so that the similarities stay in its caches."""


class PrototypeCrossAttention(nn.Module):
    """PEM-CA.

    With K the projected features and Q the projected queries, both normalised over the channels:

        K* = the feature of K inside the mask that is most similar to Q, for every head     (equations 2 and 3)
        output = W_out( alpha * normalise(W_interaction(K* x Q)) + K* ) + queries           (equations 4 and 5)

    where x is element-wise and `normalise` runs over the queries. Ablations override `select` or `interact`.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.selection = PrototypeSelection(num_heads)
        self.feature_norm = nn.BatchNorm2d(channels)
        self.feature_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.feature_linear = nn.Linear(channels, channels)
        self.query_norm = nn.LayerNorm(channels)
        self.query_linear = nn.Linear(channels, channels)
        self.interaction = nn.Linear(channels, channels)
        self.alpha = nn.Parameter(torch.ones(1, 1, channels))
        self.output = nn.Linear(channels, channels)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "Q C"],
        features: Float[Tensor, "B C H W"],
        mask_logits: Float[Tensor, "B Q H W"] | None,
    ) -> Float[Tensor, "B Q C"]:
        """Update the queries.

        Args:
            query_positions: added for the attention only.
            features: of one level, with position encoding.
            mask_logits: at the level's size; a logit of 0 or more is foreground. None for no masking.
        """
        keys = pointwise(self.feature_linear, self.feature_conv(self.feature_norm(features)))
        keys = F.normalize(keys.permute(0, 2, 3, 1).flatten(1, 2), dim=-1)  # B P C
        projected = F.normalize(self.query_linear(self.query_norm(queries + query_positions)), dim=-1)
        background = None if mask_logits is None else mask_logits.flatten(2).contiguous() < 0
        return self.interact(self.select(keys, projected, background), projected) + queries

    def select(
        self, keys: Float[Tensor, "B P C"], queries: Float[Tensor, "B Q C"], background: Bool[Tensor, "B Q P"] | None
    ) -> Float[Tensor, "B Q C"]:
        """Pick the prototypes (equations 2 and 3)."""
        return self.selection(keys, queries, background)[0]

    def interact(self, prototypes: Float[Tensor, "B Q C"], queries: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q C"]:
        """Combine prototypes and projected queries (equations 4 and 5)."""
        interaction = F.normalize(self.interaction(prototypes * queries), dim=1)
        return self.output(interaction * self.alpha + prototypes)


class PrototypeSelection(nn.Module):
    """The most similar feature inside a query's mask, for every query and head. A module so that hooks can watch it."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(
        self, keys: Float[Tensor, "B P C"], queries: Float[Tensor, "B Q C"], background: Bool[Tensor, "B Q P"] | None
    ) -> tuple[Float[Tensor, "B Q C"], Int64[Tensor, "B M Q"]]:
        """Return the prototypes and their positions.

        A query with an empty mask takes position 0; an image whose masks are all empty is not masked (authors' code).
        """
        heads = keys.unflatten(2, (self.num_heads, -1))  # B P M D
        positions = _most_similar(heads.detach(), queries.detach(), background)  # B M Q
        index = positions.transpose(1, 2)[..., None].expand(-1, -1, -1, heads.shape[3])  # B Q M D
        return heads.gather(1, index).flatten(2), positions


@torch.no_grad()
def _most_similar(
    keys: Float[Tensor, "B P M D"], queries: Float[Tensor, "B Q C"], background: Bool[Tensor, "B Q P"] | None
) -> Int64[Tensor, "B M Q"]:
    """Find the first of the most similar positions, in one pass that keeps the best so far."""
    heads = queries.unflatten(2, keys.shape[2:]).transpose(1, 2)  # B M Q D
    penalty = None
    if background is not None:
        background = background & ~background.flatten(1).all(1)[:, None, None]
        penalty = torch.zeros(background.shape, dtype=keys.dtype, device=keys.device)
        penalty = penalty.masked_fill_(background, float("-inf"))[:, None]  # B 1 Q P
    step = POSITIONS_AT_ONCE if keys.device.type == "cpu" else keys.shape[1]
    best = heads.new_full(heads.shape[:3], float("-inf"))
    positions = torch.zeros_like(best, dtype=torch.int64)
    for start in range(0, keys.shape[1], step):
        part = slice(start, start + step)
        similarity = heads @ keys[:, part].permute(0, 2, 3, 1)  # B M Q P
        if penalty is not None:
            similarity.add_(penalty[..., part])
        highest, where = similarity.max(-1)
        better = highest > best
        best, positions = torch.where(better, highest, best), torch.where(better, where + start, positions)
    return positions
