"""Sine position encoding of DETR (Carion et al., ECCV 2020), normalised to the map's extent."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


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
