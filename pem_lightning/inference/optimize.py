"""A trained network made fast: the same answers up to rounding, and options that trade digits for time."""

from __future__ import annotations

import os
import shutil
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.networks.folding import fold_batch_norms
from pem_lightning.types import Predictions

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
