"""Mask2Former's pixel decoder (Cheng et al., CVPR 2022): a deformable-attention encoder over strides 32, 16 and 8.

PEM's ablations hold their own pixel decoder against it.

Legend: B batch, C channels, H W spatial, S positions of all three levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.networks.deformable_attention import MultiScaleDeformableAttention, Sizes, pixel_centres
from pem_lightning.networks.position_encoding import sine_position_encoding

NUM_LEVELS = 3
"""The encoder works on strides 32, 16 and 8."""
NORM_GROUPS = 32
"""Of the group normalisations."""


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
        self,
        x: Float[Tensor, "B S C"],
        positions: Float[Tensor, "S C"],
        references: Float[Tensor, "S 2"],
        sizes: Sizes,
    ) -> Float[Tensor, "B S C"]:
        """Update every position; the values carry no position encoding."""
        x = self.attention_norm(x + self.attention(x + positions, references, x, sizes))
        hidden = F.relu(self.linear1(x), inplace=True)
        return self.feed_forward_norm(x + self.linear2(hidden))


class MSDeformPixelDecoder(nn.Module):
    """Backbone features -> features for the masks (stride 4) and for the transformer decoder (32, 16, 8).

    Stands in for `PixelDecoder`. Images are taken as they are, padding included, as Mask2Former does at inference.

    Args:
        in_channels: of the backbone's features at strides 4, 8, 16 and 32.
        channels: of the encoder and its levels, a multiple of 32.
        mask_channels: of the mask features.
        kernel: of the attention, see `deformable_attention.get_kernel`.
        num_layers: of the encoder.
        num_heads: of the attention.
        num_points: that a head looks at per level.
        hidden_channels: of the feed-forward layers.

    Raises:
        UserError: the channels cannot be shared out, or the kernel is unknown or not installed.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 256,
        mask_channels: int = 256,
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
            _conv_norm(c, channels, 1, bias=True, initialize=nn.init.xavier_uniform_)
            for c in in_channels[: -NUM_LEVELS - 1 : -1]
        )
        self.level_embedding = nn.Embedding(NUM_LEVELS, channels)
        self.layers = nn.ModuleList(
            MSDeformEncoderLayer(channels, num_heads, num_points, hidden_channels, kernel) for _ in range(num_layers)
        )
        self.lateral = _conv_norm(in_channels[0], channels, 1)
        self.output = _conv_norm(channels, channels, 3)
        self.mask_projection = nn.Conv2d(channels, mask_channels, 1)
        _kaiming_uniform(self.mask_projection.weight)
        assert self.mask_projection.bias is not None
        nn.init.zeros_(self.mask_projection.bias)

    def forward(
        self, features: list[Float[Tensor, "B _ _ _"]]
    ) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
        """Decode.

        Args:
            features: the backbone's, of strides 4, 8, 16 and 32.

        Returns:
            Mask features of stride 4, and the encoder's levels of strides 32, 16 and 8.
        """
        coarse_to_fine = features[: -NUM_LEVELS - 1 : -1]
        inputs = [project(x) for project, x in zip(self.input_projections, coarse_to_fine, strict=True)]
        sizes = [(x.shape[2], x.shape[3]) for x in inputs]
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in inputs], dim=1)
        positions = self._positions(sizes, x)
        references = pixel_centres(sizes, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, positions, references, sizes)
        lengths = [height * width for height, width in sizes]
        levels = [
            level.transpose(1, 2).unflatten(2, size) for level, size in zip(x.split(lengths, dim=1), sizes, strict=True)
        ]
        lateral = self.lateral(features[0])
        upsampled = F.interpolate(levels[-1], lateral.shape[-2:], mode="bilinear", align_corners=False)
        return self.mask_projection(F.relu(self.output(lateral + upsampled), inplace=True)), levels

    def _positions(self, sizes: Sizes, like: Tensor) -> Float[Tensor, "S C"]:
        """Sine encoding of the place in the level, and learned embedding of the level, of every position."""
        encodings = []
        for (height, width), level in zip(sizes, self.level_embedding.weight, strict=True):
            y, x = sine_position_encoding(height, width, self.channels, device=like.device)
            encodings.append((y + x).flatten(1).T.to(like.dtype) + level)
        return torch.cat(encodings)


_kaiming_uniform = partial(nn.init.kaiming_uniform_, a=1)


def _conv_norm(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    bias: bool = False,
    initialize: Callable[[Tensor], Tensor] = _kaiming_uniform,
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    initialize(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(NORM_GROUPS, out_channels))
