"""From uint8 images to the network's input: normalised first, then padded with 0, as the authors do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from pem_lightning.models.layers import IMAGE_MEAN, IMAGE_STD
from pem_lightning.models.pem import padded_size
from pem_lightning.types import Target


def normalize(image: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """Bring an RGB image to mean 0 and standard deviation 1 over ImageNet."""
    mean, std = _statistics(image.device)
    return (image - mean) / std


@cache
def _statistics(device: torch.device) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """Mean and deviation on a device, copied there once: the copy makes the host wait."""
    mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD), device=device)[:, :, None, None]
    return mean, std


def common_size(images: Sequence[UInt8[Tensor, "3 _ _"]]) -> tuple[int, int]:
    """The smallest height and width that all images fit into and that 32 divides."""
    return padded_size(max(x.shape[1] for x in images), max(x.shape[2] for x in images))


def pad_batch(
    images: Sequence[UInt8[Tensor, "3 _ _"]], targets: Sequence[Target], size: tuple[int, int] | None = None
) -> tuple[Float[Tensor, "B 3 H W"], list[Target]]:
    """Normalise images, and pad them and their masks at the right and bottom; padding is background of every mask.

    `size` is height and width, by default `common_size`.
    """
    height, width = size or common_size(images)

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]))

    return torch.stack([pad(normalize(x)) for x in images]), [Target(t.labels, pad(t.masks)) for t in targets]
