"""Batch normalisation folded into the convolution before it: the same function with one pass less per layer.

Modules say themselves which of their children follow one another, in `foldable`: pairs of names of a convolution and of
the normalisation of its output. Children of `nn.Sequential` do so by definition, if they are PyTorch's own: subclasses
(timm has some) do more than convolve or normalise.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from pem_lightning.networks.layers import FrozenBatchNorm2d


def fold_batch_norms(network: nn.Module) -> nn.Module:
    """Copy a network for inference: in evaluation mode, frozen, every foldable batch normalisation folded.

    Args:
        network: left untouched.

    Returns:
        A network with the same outputs up to rounding; it cannot be trained, and its state dict has other keys.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for parent in list(network.modules()):
        for conv_name, norm_name in _pairs(parent):
            conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
            if isinstance(norm, nn.BatchNorm2d):
                _fold(conv, norm)
                setattr(parent, norm_name, nn.Identity())
    return network


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    yield from getattr(parent, "foldable", ())
    if isinstance(parent, nn.Sequential):
        for (name, child), (next_name, follower) in pairwise(parent.named_children()):
            if type(child) is nn.Conv2d and type(follower) in (nn.BatchNorm2d, FrozenBatchNorm2d):
                yield name, next_name


def _fold(conv: nn.Module, norm: nn.BatchNorm2d) -> None:
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight,  # type: ignore[arg-type]
        conv.bias,  # type: ignore[arg-type]
        norm.running_mean,  # type: ignore[arg-type]
        norm.running_var,  # type: ignore[arg-type]
        norm.eps,
        norm.weight,
        norm.bias,
        transpose=isinstance(conv, nn.ConvTranspose2d),
    )
