"""Multiply-accumulates of the network, by the conventions of fvcore, in which the field publishes them.

Convolutions and matrix products count one per multiply-accumulate (deformable convolutions included, as their matrix
product), batch normalisation 2 per element, layer and group normalisation 5, bilinear resizing 4; everything else is
free. So is the sampling of deformable attention, a custom operator in the networks whose numbers are published.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# The counter counts two operations per multiply-accumulate, so these are twice fvcore's factors.
_ELEMENTWISE = {
    torch.ops.aten._native_batch_norm_legit_no_training: 4,
    torch.ops.aten.native_layer_norm: 10,
    torch.ops.aten.native_group_norm: 10,
    torch.ops.aten.upsample_bilinear2d: 8,
}


def _per_element(factor: int) -> Any:
    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        shape: Sequence[int] = out_shape[0] if isinstance(out_shape[0], Sequence | torch.Size) else out_shape
        return factor * prod(shape)

    return flops


def count_gmacs(network: nn.Module, height: int, width: int) -> float:
    """Count the giga multiply-accumulates of one image in evaluation mode. Nothing is computed, only shapes are.

    Args:
        network: takes images [B, 3, H, W]; left untouched.
        height: of the image in pixels.
        width: of the image in pixels.
    """
    network = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    image = torch.empty(1, 3, height, width, device="meta")
    mapping = {op: _per_element(factor) for op, factor in _ELEMENTWISE.items()}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        network(image)
    return counter.get_total_flops() / 2e9


def count_parameters(network: nn.Module) -> int:
    """Count the trainable numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
