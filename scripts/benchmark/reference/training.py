"""Preparation of a batch and the optimiser, as the authors' framework has them.

Legend: B batch, N segments, H W spatial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
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
    height, width = padded_size(max(x.shape[1] for x in images), max(x.shape[2] for x in images))

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1]))

    batch = torch.stack([pad((image - mean) / std) for image in images])
    return batch, [Target(target.labels, pad(target.masks)) for target in targets]


def build_optimizer(network: nn.Module, **groups: Any) -> torch.optim.AdamW:
    """AdamW with one group per parameter and PyTorch's defaults; for `groups` see `parameter_groups`."""
    shared = parameter_groups(network, **groups)
    return torch.optim.AdamW([{**group, "params": [parameter]} for group in shared for parameter in group["params"]])
