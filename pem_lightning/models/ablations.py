"""The paper's ablations of PEM-CA: other cross-attentions with the same interface.

Legend: B batch, Q queries, C channels, M heads, D channels of a head, H W spatial, P positions (H * W).
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pem_lightning.models.layers import pointwise, sine_position_encoding
from pem_lightning.models.prototype_attention import PrototypeCrossAttention


class MeanCrossAttention(PrototypeCrossAttention):
    """PEM-CA with the mean of the features inside the mask, of the whole map if it is empty, as the prototype."""

    def select(
        self, keys: Float[Tensor, "B P C"], queries: Float[Tensor, "B Q C"], background: Bool[Tensor, "B Q P"] | None
    ) -> Float[Tensor, "B Q C"]:
        """Average; all heads share the mean (in place of equations 2 and 3)."""
        if background is None:
            return keys.mean(1, keepdim=True).expand_as(queries)
        foreground = (~background | background.all(2, keepdim=True)).to(keys.dtype)  # B Q P
        return foreground @ keys / foreground.sum(2, keepdim=True)


class WithoutInteraction(PrototypeCrossAttention):
    """PEM-CA without the product: W_out(K*) + queries in place of equations 4 and 5."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__(channels, num_heads)
        del self.interaction, self.alpha
        self.query_norm.requires_grad_(False)  # a selection gives no gradient
        self.query_linear.requires_grad_(False)

    def interact(self, prototypes: Float[Tensor, "B Q C"], queries: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q C"]:
        """Take the prototypes as they are."""
        return self.output(prototypes)


class MeanWithoutInteraction(WithoutInteraction, MeanCrossAttention):
    """Both at once."""


class MaskedCrossAttention(nn.Module):
    """Mask2Former's masked cross-attention (Cheng et al., CVPR 2022, equation 2) in place of equations 2 to 5.

        output = W_out( softmax(mask + Q K^T / sqrt(D)) V ) + queries

    Keys carry the position encoding, values do not. A query with an empty mask looks everywhere. The queries are
    normalised before the attention, as in PEM-CA, not after it.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_norm = nn.LayerNorm(channels)
        self.query_linear = nn.Linear(channels, channels)
        self.key_linear = nn.Linear(channels, channels)
        self.value_linear = nn.Linear(channels, channels)
        self.output = nn.Linear(channels, channels)
        for layer in (self.query_linear, self.key_linear, self.value_linear, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "Q C"],
        features: Float[Tensor, "B C H W"],
        mask_logits: Float[Tensor, "B Q H W"] | None,
    ) -> Float[Tensor, "B Q C"]:
        """Update the queries; the features come without position encoding."""
        _, C, H, W = features.shape
        y, x = sine_position_encoding(H, W, C, device=features.device)
        keys = self._heads(pointwise(self.key_linear, features + y.to(features.dtype) + x.to(features.dtype)))
        values = self._heads(pointwise(self.value_linear, features))
        projected = self.query_linear(self.query_norm(queries + query_positions))
        projected = projected.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # B M Q D
        attended = None
        if mask_logits is not None:
            background = mask_logits.flatten(2) < 0
            attended = (~background | background.all(2, keepdim=True))[:, None]  # B 1 Q P
        out = F.scaled_dot_product_attention(projected, keys, values, attended)
        return self.output(out.transpose(1, 2).flatten(2)) + queries

    def _heads(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B M P D"]:
        return x.flatten(2).unflatten(1, (self.num_heads, -1)).transpose(2, 3)


ATTENTIONS: dict[tuple[str, bool], type[nn.Module]] = {
    ("prototype", True): PrototypeCrossAttention,
    ("prototype", False): WithoutInteraction,
    ("mean", True): MeanCrossAttention,
    ("mean", False): MeanWithoutInteraction,
    ("dot_product", True): MaskedCrossAttention,
}
"""Arguments (attention, interaction) of `TransformerDecoder` -> module."""
