"""PEM-CA: prototype-based masked cross-attention, the paper's contribution (section 3.2, figure 3).

Dot-product attention mixes all features of a query's mask. Those features are much alike, so PEM-CA keeps, per query
and head, only the one most similar to the query, its *prototype*, and lets the two interact by an element-wise product.

Legend: B batch, Q queries, C channels, M heads, D channels of a head, H W spatial, P positions (H * W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn


def select_prototypes(
    features: Float[Tensor, "B P C"],
    queries: Float[Tensor, "B Q C"],
    background: Bool[Tensor, "B Q P"],
    num_heads: int,
) -> tuple[Float[Tensor, "B Q C"], Int64[Tensor, "B M Q"]]:
    """Pick, per query and head, the most similar feature inside the query's mask (equations 2 and 3).

    A query whose mask is empty takes position 0. Only where the masks of *all* queries of an image are empty, masking
    is off for that image, as in the authors' code.

    Args:
        features: keys, normalised over the channels.
        queries: normalised over the channels.
        background: True where a position lies outside a query's mask.
        num_heads: the heads share the channels out between them.

    Returns:
        The prototypes, and their positions.
    """
    B, P, C = features.shape
    D = C // num_heads
    keys = features.view(B, P, num_heads, D).permute(0, 2, 3, 1)  # B M D P
    heads = queries.view(B, -1, num_heads, D).transpose(1, 2)  # B M Q D
    with torch.no_grad():
        background = background & ~background.flatten(1).all(1)[:, None, None]
        similarity = (heads @ keys).masked_fill_(background[:, None], float("-inf"))  # B M Q P
        positions = similarity.argmax(-1)  # B M Q
    index = positions[:, :, None, :].expand(-1, -1, D, -1)
    prototypes = keys.gather(3, index)  # B M D Q
    return prototypes.permute(0, 3, 1, 2).flatten(2), positions


class PrototypeCrossAttention(nn.Module):
    """PEM-CA.

    With K the projected features, Q the projected queries, both normalised, and K* the prototypes:

        output = W_out( alpha * normalise(W_interaction(K* x Q)) + K* ) + queries

    where x is element-wise and `normalise` runs over the queries (equations 4 and 5).
    """

    def __init__(self, channels: int = 256, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
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
        feature_positions: Float[Tensor, "C H W"],
        mask_logits: Float[Tensor, "B Q H W"],
    ) -> Float[Tensor, "B Q C"]:
        """Update the queries.

        Args:
            queries: the residual stream.
            query_positions: learned position embeddings, added for attention only.
            features: of one level of the pixel decoder.
            feature_positions: their position encoding.
            mask_logits: the queries' masks so far, at the level's size; a logit of exactly 0 is foreground.
        """
        keys = self.feature_conv(self.feature_norm(features + feature_positions))
        keys = F.normalize(self.feature_linear(keys.flatten(2).transpose(1, 2)), dim=-1)
        projected = F.normalize(self.query_linear(self.query_norm(queries + query_positions)), dim=-1)
        prototypes, _ = select_prototypes(keys, projected, mask_logits.flatten(2) < 0, self.num_heads)
        interaction = F.normalize(self.interaction(prototypes * projected), dim=1)
        return self.output(interaction * self.alpha + prototypes) + queries
