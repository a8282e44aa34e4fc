"""Multiply-accumulates and parameters of a network, counted by the conventions of fvcore, as the field publishes them.

Convolutions and matrix products count one per multiply-accumulate, batch normalisation 2 per element, layer and group
normalisation 5, bilinear resizing 4. Everything else is free, the sampling of deformable operators included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_gmacs(network: nn.Module, height: int, width: int) -> float:
    """Count the giga multiply-accumulates of one image [1, 3, height, width] in evaluation mode, from shapes alone."""
    network = copy.deepcopy(network).to("meta").eval().requires_grad_(False)
    aten = torch.ops.aten
    mapping = {  # in operations, of which a multiply-accumulate is two
        aten._native_batch_norm_legit_no_training: _per_element(4),
        aten.native_layer_norm: _per_element(10),
        aten.native_group_norm: _per_element(10),
        aten.upsample_bilinear2d: _per_element(8),
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        network(torch.empty(1, 3, height, width, device="meta"))
    return counter.get_total_flops() / 2e9


def _per_element(factor: int) -> Callable[..., int]:
    def flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
        return factor * prod(out_shape[0] if isinstance(out_shape[0], Sequence) else out_shape)

    return flops


def count_parameters(network: nn.Module) -> int:
    """Count the trainable numbers."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
