"""Preparation of a batch and the optimiser, as the authors' framework has them.

Legend: B batch, N segments, H W spatial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from pem_lightning.models.pem import padded_size
from pem_lightning.preprocess import IMAGE_MEAN, IMAGE_STD
from pem_lightning.training.optim import parameter_groups
from pem_lightning.types import Target


def prepare(
    images: Sequence[UInt8[Tensor, "3 _ _"]], targets: Sequence[Target]
) -> tuple[Float[Tensor, "B 3 H W"], list[Target]]:
    """Normalise and pad one image after the other; see `pad_batch`."""
    mean, std = (torch.tensor(x, device=images[0].device).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    normalised = [(image - mean) / std for image in images]
    height, width = padded_size(max(x.shape[1] for x in images), max(x.shape[2] for x in images))
    batch = normalised[0].new_zeros(len(images), 3, height, width)
    for place, image in zip(batch, normalised, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    padded = []
    for target in targets:
        masks = target.masks.new_zeros(len(target.masks), height, width)
        masks[:, : target.masks.shape[1], : target.masks.shape[2]] = target.masks
        padded.append(Target(target.labels, masks))
    return batch, padded


def build_optimizer(network: nn.Module, **groups: Any) -> torch.optim.AdamW:
    """AdamW with one group per parameter and PyTorch's defaults; for `groups` see `parameter_groups`."""
    singles = [
        {**group, "params": [parameter]}
        for group in parameter_groups(network, **groups)
        for parameter in group["params"]
    ]
    return torch.optim.AdamW(singles)
