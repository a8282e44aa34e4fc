"""Building blocks that several parts of the network share."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
import torch
from jaxtyping import Float
from torch import Tensor, nn

NormFactory = Callable[[int], nn.Module]
"""Makes a normalisation layer for a number of channels."""


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that never learns: constant scale, shift and statistics, as ADE20K's ResNet uses.

    Loads and saves exactly like `nn.BatchNorm2d`.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.eval()
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)


class ConvBNReLU(nn.Module):
    """Convolution without bias that keeps the size at stride 1, batch normalisation, ReLU."""

    foldable = (("conv", "bn"),)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        norm: NormFactory = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = norm(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, a=1)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Apply the three in order."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class MLP(nn.Module):
    """Linear layers with ReLU between them (none after the last)."""

    def __init__(self, in_channels: int, hidden_channels: int, out_channels: int, num_layers: int) -> None:
        super().__init__()
        widths = [in_channels] + [hidden_channels] * (num_layers - 1) + [out_channels]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Float[Tensor, "*batch C_in"]) -> Float[Tensor, "*batch C_out"]:
        """Map the last axis."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x)


def pointwise(layer: nn.Linear, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
    """Apply a linear layer at every pixel as a 1x1 convolution: faster on CPUs, and the memory format stays."""
    return F.conv2d(x, layer.weight[:, :, None, None], layer.bias)


def sine_position_encoding(
    height: int, width: int, channels: int, *, device: torch.device | str = "cpu", temperature: float = 10000.0
) -> tuple[Float[Tensor, "channels height 1"], Float[Tensor, "channels 1 width"]]:
    """Encode every position of a map: the first half of the channels in y, the second in x.

    Each half alternates sine and cosine at wavelengths that grow geometrically from 2 pi up to `temperature` x 2 pi,
    over coordinates that run from just above 0 to 2 pi whatever the map's size.

    Returns:
        Two parts whose sum is the encoding: y with zeros in the second half of the channels, x with zeros in the first.
        Added to a map one after the other they spare a map of their own.
    """
    half = channels // 2
    frequency = torch.arange(half // 2, dtype=torch.float32, device=device) * (2 / half)
    wavelength = temperature**frequency

    def encode(length: int) -> Float[Tensor, "half_channels length"]:
        positions = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * math.pi)
        angles = positions / wavelength[:, None]
        return torch.stack((angles.sin(), angles.cos()), dim=1).flatten(0, 1)

    y, x = encode(height), encode(width)
    return torch.cat((y, torch.zeros_like(y)))[:, :, None], torch.cat((torch.zeros_like(x), x))[:, None, :]
