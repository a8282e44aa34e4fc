"""The transformer decoder: layers of PEM-CA, self-attention and feed-forward, and the prediction after each.

As in Mask2Former (Cheng et al., CVPR 2022), learned queries visit the pixel decoder's levels in turns, from coarse to
fine, and the masks they predict decide where the next layer looks.

Legend: B batch, Q queries, C channels, H W spatial, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.ablations import ATTENTIONS
from pem_lightning.models.layers import MLP, projection, sine_position_encoding
from pem_lightning.types import MaskFactors, Predictions, UserError

NUM_LEVELS = 3  # strides 32, 16 and 8


class SelfAttention(nn.Module):
    """Pre-norm self-attention between the queries; the values carry no position."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        nn.init.xavier_uniform_(self.attention.out_proj.weight)

    def forward(self, queries: Float[Tensor, "B Q C"], query_positions: Float[Tensor, "Q C"]) -> Float[Tensor, "B Q C"]:
        """Update the queries."""
        values = self.norm(queries)
        positioned = values + query_positions
        return queries + self.attention(positioned, positioned, values, need_weights=False)[0]


class FeedForward(nn.Module):
    """Pre-norm two-layer perceptron."""

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, hidden_channels)
        self.linear2 = nn.Linear(hidden_channels, channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, queries: Float[Tensor, "B Q C"]) -> Float[Tensor, "B Q C"]:
        """Update the queries."""
        return queries + self.linear2(F.relu(self.linear1(self.norm(queries))))


class DecoderLayer(nn.Module):
    """PEM-CA (or an ablation's cross-attention), then self-attention, then feed-forward."""

    def __init__(self, channels: int, num_heads: int, hidden_channels: int, cross_attention: type[nn.Module]) -> None:
        super().__init__()
        self.cross_attention = cross_attention(channels, num_heads)
        self.self_attention = SelfAttention(channels, num_heads)
        self.feed_forward = FeedForward(channels, hidden_channels)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "Q C"],
        features: Float[Tensor, "B C H W"],
        mask_logits: Float[Tensor, "B Q H W"] | None,
    ) -> Float[Tensor, "B Q C"]:
        """Update the queries; for the arguments see `PrototypeCrossAttention`."""
        queries = self.cross_attention(queries, query_positions, features, mask_logits)
        return self.feed_forward(self.self_attention(queries, query_positions))


class TransformerDecoder(nn.Module):
    """Learned queries -> class logits and mask logits.

    Args:
        in_channels: of the pixel decoder's levels.
        num_classes: K, without "no object".
        channels: C, a multiple of 4 and of `num_heads`.
        num_layers: layer i sees level i modulo 3.
        auxiliary: when to return the layers' predictions for deep supervision: "training", "always" or "never".
        attention: "prototype" (PEM-CA); ablations: "mean" of the masked features, Mask2Former's "dot_product".
        masked: False for the ablation in which queries look at a whole level.
        interaction: False for the ablation without PEM-CA's element-wise product.

    Raises:
        UserError: a value is not offered.
    """

    def __init__(
        self,
        in_channels: int,
        mask_channels: int,
        *,
        num_classes: int,
        num_queries: int,
        channels: int = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        hidden_channels: int = 2048,
        auxiliary: str = "training",
        attention: str = "prototype",
        masked: bool = True,
        interaction: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("num_layers", num_layers), ("num_queries", num_queries)):
            if value < 1:
                raise UserError(f"{name}={value}: choose at least 1")
        if channels % num_heads or channels % 4:
            raise UserError(f"channels={channels}: choose a multiple of 4 and of num_heads={num_heads}")
        if auxiliary not in ("training", "always", "never"):
            raise UserError(f"auxiliary={auxiliary}: choose training, always or never")
        if (attention, True) not in ATTENTIONS:
            raise UserError(f"attention={attention}: choose {', '.join(name for name, whole in ATTENTIONS if whole)}")
        if (attention, interaction) not in ATTENTIONS:
            raise UserError(f"attention={attention} has no interaction to leave out: choose interaction=true with it")
        self.channels, self.auxiliary, self.attention, self.masked = channels, auxiliary, attention, masked
        num_levels = min(NUM_LEVELS, num_layers)
        self.query_features = nn.Embedding(num_queries, channels)
        self.query_positions = nn.Embedding(num_queries, channels)
        self.level_embedding = nn.Embedding(num_levels, channels)
        self.input_projections = nn.ModuleList(projection(in_channels, channels) for _ in range(num_levels))
        self.layers = nn.ModuleList(
            DecoderLayer(channels, num_heads, hidden_channels, ATTENTIONS[attention, interaction])
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(channels)
        self.class_head = nn.Linear(channels, num_classes + 1)
        self.mask_head = MLP(channels, channels, mask_channels, 3)

    def forward(
        self, mask_features: Float[Tensor, "B C_mask H W"], levels: list[Float[Tensor, "B C_in _ _"]]
    ) -> Predictions:
        """Decode what the pixel decoder returns.

        Resizing commutes with the product of mask embeddings and features: without auxiliary predictions the features
        are resized once per level, not the masks per layer.
        """
        if not mask_features.is_cuda:  # faster on CPUs, also for what reads the masks, which inherit the format
            mask_features = mask_features.contiguous(memory_format=torch.channels_last)
        inputs = [self._project(i, level) for i, level in enumerate(levels[: len(self.input_projections)])]
        queries = self.query_features.weight.expand(len(mask_features), -1, -1)
        auxiliary: list[Predictions] = []
        wanted = self.auxiliary == "always" or (self.auxiliary == "training" and self.training)
        with torch.no_grad():
            small = [] if wanted or not self.masked else [_resize(mask_features, x.shape[-2:]) for x in inputs]
        for i, layer in enumerate(self.layers):
            features, mask_logits = inputs[i % NUM_LEVELS], None
            if wanted:
                auxiliary.append(self.predict(queries, mask_features))
            with torch.no_grad():
                if self.masked and wanted:
                    mask_logits = _resize(auxiliary[-1].mask_logits, features.shape[-2:])
                elif self.masked:
                    mask_logits = _mask_logits(self.mask_head(self.norm(queries)), small[i % NUM_LEVELS])
            queries = layer(queries, self.query_positions.weight, features, mask_logits)
        return self.predict(queries, mask_features)._replace(auxiliary=tuple(auxiliary))

    def _project(self, i: int, level: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C H W"]:
        """Project a level and add its embedding and the position encoding."""
        x = self.input_projections[i](level)
        if self.attention == "dot_product":  # encodes positions itself, in the keys only
            return x + self.level_embedding.weight[i, :, None, None].to(x.dtype)
        y_encoding, x_encoding = sine_position_encoding(x.shape[2], x.shape[3], self.channels, device=x.device)
        x = x + (self.level_embedding.weight[i, :, None, None] + y_encoding).to(x.dtype)
        return x.add_(x_encoding.to(x.dtype))

    def predict(self, queries: Float[Tensor, "B Q C"], mask_features: Float[Tensor, "B C_mask H W"]) -> Predictions:
        """Predict from the queries before or after any layer."""
        normed = self.norm(queries)
        embeddings = self.mask_head(normed)
        # The losses look at matched queries only, whose gradients go through the factors.
        factors = MaskFactors(embeddings, mask_features) if torch.is_grad_enabled() else None
        return Predictions(self.class_head(normed), _mask_logits(embeddings, mask_features), mask_factors=factors)


def _mask_logits(embeddings: Float[Tensor, "B Q C"], features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B Q H W"]:
    """Multiply every mask embedding with the features of every pixel."""
    if features.is_cuda and len(features) > 1:
        return (embeddings @ features.flatten(2)).unflatten(2, features.shape[-2:])
    # As 1x1 convolutions: more than twice as fast on CPUs if the features are channels-last.
    masks = [F.conv2d(x, e[:, :, None, None]) for x, e in zip(features.split(1), embeddings, strict=True)]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def _resize(maps: Float[Tensor, "B C _ _"], size: torch.Size) -> Float[Tensor, "B C H W"]:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
