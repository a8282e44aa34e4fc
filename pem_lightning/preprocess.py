"""From uint8 images to what the network takes. Normalised first, then padded with 0, as the authors do.

Legend: B batch, N segments, H W spatial.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pem_lightning.models.pem import padded_size
from pem_lightning.types import Target

IMAGE_MEAN = (123.675, 116.280, 103.530)
"""ImageNet's mean over RGB values of 0 to 255."""
IMAGE_STD = (58.395, 57.120, 57.375)
"""ImageNet's standard deviation, likewise."""


def normalize(image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """Bring an RGB image to mean 0 and deviation 1 over ImageNet."""
    mean, std = _statistics(image.device)
    return (image - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and deviation on a device, copied there once: the copy makes the host wait."""
    mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD), device=device)[:, :, None, None]
    return mean, std


def common_size(images: Sequence[UInt8[Tensor, "3 _ _"]]) -> tuple[int, int]:
    """The size that all images fit into: a multiple of 32."""
    return padded_size(max(x.shape[1] for x in images), max(x.shape[2] for x in images))


def pad_batch(
    images: Sequence[UInt8[Tensor, "3 _ _"]], targets: Sequence[Target], size: tuple[int, int] | None = None
) -> tuple[Float[Tensor, "B 3 H W"], list[Target]]:
    """Normalise images and bring them, and their masks, to one size at right and bottom.

    Padding is background of every mask.

    Args:
        images: of any sizes.
        targets: one per image.
        size: height and width; None for that of `common_size`.
    """
    height, width = common_size(images) if size is None else size

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    return torch.stack([pad(normalize(x)) for x in images]), [Target(t.labels, pad(t.masks)) for t in targets]
