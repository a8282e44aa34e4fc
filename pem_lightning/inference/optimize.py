"""A trained network made fast: the same answers up to rounding, and options that trade digits for time.

Here: fewer layers and queries, fused batch normalisations, memory format, precision, compilation. Without gradients
other parts take shorter ways of their own: `TransformerDecoder.forward` (masks only at the size that the next layer
needs), `deform_conv_torch` (strip by strip), `PrototypeSelection` (the most similar features chunk by chunk), and
`fast_argmax` for the results.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from pem_lightning.models.layers import FrozenBatchNorm2d
from pem_lightning.models.pem import PEM
from pem_lightning.models.transformer_decoder import TransformerDecoder
from pem_lightning.types import Predictions, UserError

Precision = Literal["float32", "bfloat16", "float16"]
CompileMode = Literal["default", "reduce-overhead", "max-autotune"]
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def check_compile(key: str, mode: str | None) -> None:
    """Refuse an unknown mode of `torch.compile`, or a missing compiler; `key` names the setting."""
    if mode is None:
        return
    if mode not in get_args(CompileMode):
        raise UserError(f"{key}={mode}: choose null, {', '.join(get_args(CompileMode))}")
    compilers = ("cl",) if sys.platform == "win32" else (os.environ.get("CXX", "g++"), "clang++")
    if not any(map(shutil.which, compilers)):
        raise UserError(f"{key} needs a C++ compiler: install g++, or use {key}=null")


def shorten(network: nn.Module, decoder_layers: Any = None, queries: Any = None) -> nn.Module:
    """Copy a trained PEM so that it computes less; without an option it is the network itself.

    Args:
        network: is copied.
        decoder_layers: how many of the transformer decoder's layers run, a whole number; 0 for the queries as learned.
            Deep supervision trains each of them to predict.
        queries: numbers of the learned queries to keep, counted from 0.

    Raises:
        UserError: there is no such layer or query, or the network has not learned to predict after that layer.
    """
    if decoder_layers is None and queries is None:
        return network
    shortened = copy.deepcopy(network)
    decoder = cast(PEM, shortened).transformer_decoder
    if decoder_layers is not None:
        _exit_after(decoder, decoder_layers)
    if queries is not None:
        _keep(decoder, queries)
    return shortened


def _exit_after(decoder: TransformerDecoder, layers: Any) -> None:
    count = len(decoder.layers)
    if not _is_index(layers, count + 1):
        raise UserError(f"inference.decoder_layers={layers}: choose 0 to {count}, the layers it was trained with")
    if decoder.auxiliary == "never" and layers < count:
        raise UserError(
            f"inference.decoder_layers={layers} needs deep supervision, without which this network was trained: "
            "leave it out"
        )
    decoder.layers = decoder.layers[:layers]
    decoder.input_projections = decoder.input_projections[:layers]  # of the levels that are still visited


def _keep(decoder: TransformerDecoder, queries: Any) -> None:
    count = decoder.query_features.num_embeddings
    kept = list(queries) if isinstance(queries, Sequence) and not isinstance(queries, str) else []
    if not kept or len(set(kept)) < len(kept) or not all(_is_index(query, count) for query in kept):
        raise UserError(f"inference.queries={queries}: give different numbers from 0 to {count - 1}, e.g. [0,1,2]")
    for embedding in (decoder.query_features, decoder.query_positions):
        embedding.weight = nn.Parameter(embedding.weight.detach()[kept])
        embedding.num_embeddings = len(kept)


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


class OptimizedNetwork(nn.Module):
    """A network with fused batch normalisations, in channels-last memory format and in the wanted precision.

    Args:
        network: is copied.
        precision: of weights and features. Logits come out in float32 (float64 if the network is).
        compile: a mode of `torch.compile`, or None. The first image of every new size then takes minutes.

    Raises:
        UserError: the precision or the mode is unknown, or there is no compiler.
    """

    def __init__(self, network: nn.Module, precision: str = "float32", compile: str | None = None) -> None:
        super().__init__()
        if precision not in get_args(Precision):
            raise UserError(f"inference.precision={precision}: choose {', '.join(get_args(Precision))}")
        check_compile("inference.compile", compile)
        self.compile_mode = compile
        self.network = fuse_batch_norms(network)
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.dtype = next(network.parameters()).dtype if precision == "float32" else getattr(torch, precision)
        self.network.to(self.dtype)
        self._compile()

    def _compile(self) -> None:
        if self.compile_mode is not None:
            self.network.compile(mode=self.compile_mode, dynamic=False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Compile a copy, also one in another process, as its original: compiled code is not copied."""
        super().__setstate__(state)
        self._compile()

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """As `PEM.forward`."""
        out = self.network(images.to(self.dtype, memory_format=torch.channels_last))
        if self.dtype in (torch.float32, torch.float64):
            return out
        return Predictions(out.class_logits.float(), out.mask_logits.float())


def fuse_batch_norms(network: nn.Module) -> nn.Module:
    """Copy a network for inference: in evaluation mode, frozen, batch normalisations fused into their convolutions.

    Fused are the pairs that a module names in `fusable`, and PyTorch's own layers that follow one another in an
    `nn.Sequential`; subclasses (timm has some) do more than convolve or normalise. The state dict has other keys.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    for parent in list(network.modules()):
        pairs = list(getattr(parent, "fusable", ()))
        if isinstance(parent, nn.Sequential):
            for (name, child), (next_name, follower) in pairwise(parent.named_children()):
                if type(child) is nn.Conv2d and type(follower) in NORMS:
                    pairs.append((name, next_name))
        for conv_name, norm_name in pairs:
            conv, norm = (cast(Any, parent.get_submodule(name)) for name in (conv_name, norm_name))
            if type(norm) in NORMS:
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                    transpose=isinstance(conv, nn.ConvTranspose2d),
                )
                setattr(parent, norm_name, nn.Identity())
    return network
