"""A trained network made fast: the same answers up to rounding, and options that trade digits for time."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from pem_lightning.models.layers import FrozenBatchNorm2d
from pem_lightning.types import Predictions, UserError

Precision = Literal["float32", "bfloat16", "float16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]


def check_compile(key: str, mode: str | None) -> None:
    """Check a setting of `torch.compile`.

    Args:
        key: of the setting.
        mode: its value; None for no compilation.

    Raises:
        UserError: the mode is unknown, or there is no compiler.
    """
    if mode is None:
        return
    if mode not in get_args(CompileMode):
        raise UserError(f"{key}={mode}: choose null, {', '.join(get_args(CompileMode))}")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "clang++")):
        raise UserError(f"{key} needs a C++ compiler: install g++, or use {key}=null")


class OptimizedNetwork(nn.Module):
    """A network with its batch normalisations folded, in channels-last memory format and in the wanted precision.

    Args:
        network: left untouched; a copy of its weights is kept.
        precision: of weights and features. Logits come out in float32 (float64 if the network is).
        compile: a mode of `torch.compile`, or None. "reduce-overhead" records CUDA graphs on a GPU. The first image of
            every new size takes minutes then.

    Raises:
        UserError: the precision or the mode is unknown, or there is no compiler.
    """

    def __init__(self, network: nn.Module, precision: str = "float32", compile: str | None = None) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise UserError(f"inference.precision={precision}: choose {', '.join(get_args(Precision))}")
        check_compile("inference.compile", compile)
        self.compile_mode = compile
        self.network = fold_batch_norms(network)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = next(network.parameters()).dtype
        if precision != "float32":
            self.dtype = getattr(torch, precision)
            self.network.to(self.dtype)
        if compile is not None:
            self.network.compile(mode=compile, dynamic=False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """Predict. Arguments and result are those of `PEM.forward`."""
        out = self.network(images.to(self.dtype, memory_format=torch.channels_last))
        if self.dtype in (torch.float32, torch.float64):
            return out
        return Predictions(out.class_logits.float(), out.mask_logits.float())


# Batch normalisation folded into the convolution before it: the same function with one pass less per layer.
#
# Modules say themselves which of their children follow one another, in `foldable`: pairs of names of a convolution
# and of the normalisation of its output. Children of `nn.Sequential` do so by definition, if they are PyTorch's own:
# subclasses (timm has some) do more than convolve or normalise.


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
            if isinstance(norm, nn.BatchNorm2d | FrozenBatchNorm2d):
                _fold(conv, norm)
                setattr(parent, norm_name, nn.Identity())
    return network


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    yield from getattr(parent, "foldable", ())
    if isinstance(parent, nn.Sequential):
        for (name, child), (next_name, follower) in pairwise(parent.named_children()):
            if type(child) is nn.Conv2d and type(follower) in (nn.BatchNorm2d, FrozenBatchNorm2d):
                yield name, next_name


def _fold(conv: nn.Module, norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> None:
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
