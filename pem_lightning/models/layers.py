"""Building blocks that several parts of the network share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.types import UserError

NormFactory = Callable[..., nn.Module]
"""Number of channels (and `eps`) -> normalisation layer."""

IMAGE_MEAN = (123.675, 116.280, 103.530)
"""ImageNet's mean of RGB values in 0 to 255, by which images are normalised."""
IMAGE_STD = (58.395, 57.120, 57.375)


class Backbone(nn.Module, ABC):
    """A feature extractor."""

    channels: tuple[int, ...]  # at strides 4, 8, 16 and 32

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features at strides 4, 8, 16 and 32 from normalised images, whose sides are multiples of 32."""

    def load_pretrained(self, source: bool | str = True) -> None:
        """Load the weights of the backbone's library (True) or of a file; most have none and raise `UserError`."""
        raise UserError("backbone.pretrained is for backbone=timm: leave it out")


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation that never learns, as in ADE20K's ResNet, with the state dict of `nn.BatchNorm2d`."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Normalise."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ConvBNReLU(nn.Module):
    """Convolution without bias that keeps the size at stride 1, batch normalisation, ReLU."""

    fusable = (("conv", "bn"),)  # a convolution and the normalisation after it, which `optimize` merges

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, norm: NormFactory = nn.BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn = norm(out_channels)
        nn.init.kaiming_normal_(self.conv.weight, a=1)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Apply all three."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


def projection(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Make a 1x1 convolution that starts as Mask2Former's do."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

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
    height: int, width: int, channels: int, *, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "channels height 1"], Float[Tensor, "channels 1 width"]]:
    """Encode positions by sines and cosines: the first half of the channels in y, the second half in x.

    Coordinates run up to 2 pi whatever the size; wavelengths grow from 2 pi to 10000 x 2 pi. The encoding is the sum of
    the two parts: added one after the other, they need no full map of their own.
    """
    half = channels // 2
    wavelength = 10000.0 ** (torch.arange(half // 2, dtype=torch.float32, device=device) * (2 / half))

    def encode(length: int) -> Float[Tensor, "half_channels length"]:
        positions = torch.arange(1, length + 1, dtype=torch.float32, device=device) / (length + 1e-6) * (2 * math.pi)
        angles = positions / wavelength[:, None]
        return torch.stack((angles.sin(), angles.cos()), dim=1).flatten(0, 1)

    y, x = encode(height), encode(width)
    return torch.cat((y, torch.zeros_like(y)))[:, :, None], torch.cat((torch.zeros_like(x), x))[:, None, :]
