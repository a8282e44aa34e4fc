"""The two deformable operators as the kernel benchmark sees them: who computes them, and on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pem_lightning.models import deformable_conv, mask2former_pixel_decoder
from pem_lightning.models.deformable_conv import Kernel
from pem_lightning.models.pem import padded_size
from pem_lightning.types import UserError
from scripts.benchmark.reference.deformable_attention import ms_deform_attn
from scripts.benchmark.reference.network import deform_conv

STRIDES = (32, 16, 8)
REFERENCE = "grid_sample"
CONV_CHANNELS = 128
HEADS, HEAD_CHANNELS, POINTS = 8, 32, 4
COMPARED_QUERIES = 16
"""Attention's results are compared at every 16th query, because in float64 all of them would take gigabytes."""


@dataclass(frozen=True)
class Problem:
    """Something to compute.

    Attributes:
        label: its size, for the report.
        tensors: the arguments, all of which take gradients.
        run: (kernel, tensors) -> output.
        reduce: tensors -> those on which results are compared.
    """

    label: str
    tensors: list[Tensor]
    run: Callable[[Kernel, list[Tensor]], Tensor]
    reduce: Callable[[list[Tensor]], list[Tensor]] = list

    def in_float64(self) -> list[Tensor]:
        """What results are compared on, as leaves of their own."""
        return [t.detach().double().requires_grad_() for t in self.reduce(self.tensors)]


@dataclass(frozen=True)
class Operator:
    """A deformable operator.

    Attributes:
        name: of the report's section.
        note: on what it is measured.
        reference: its definition, on `grid_sample`.
        get_kernel: as of its module.
        libraries: names of kernels that may not be installed.
        problems: (size of the image, batch, device) -> what to compute.
    """

    name: str
    note: str
    reference: Kernel
    get_kernel: Callable[[str], Kernel]
    libraries: tuple[str, ...]
    problems: Callable[[tuple[int, int], int, str | torch.device], list[Problem]]

    def installed(self) -> tuple[dict[str, Kernel], dict[str, str]]:
        """The kernels that can be used here, and why the others cannot."""
        kernels: dict[str, Kernel] = {"torch": self.get_kernel("torch"), REFERENCE: self.reference}
        missing = {}
        for name in self.libraries:
            try:
                kernels[name] = self.get_kernel(name)
            except UserError as error:
                missing[name] = str(error)
        return kernels, missing


def _between_pixels(offsets: Tensor) -> Tensor:
    """Round to odd multiples of 1/128, never next to a whole pixel.

    There the gradients jump, and mmcv can find itself on the other side: it floors positions in single precision
    (`floorf`) even in float64.
    """
    return ((64 * offsets).floor() + 0.5) / 64


def pyramid(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of an image's levels, from the coarsest on."""
    height, width = padded_size(*size)
    return [(height // stride, width // stride) for stride in STRIDES]


def conv_problems(size: tuple[int, int], batch: int, device: str | torch.device) -> list[Problem]:
    """One per level: features, offsets of about a pixel, modulation and weights."""
    problems = []
    for height, width in pyramid(size):
        draw = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(batch, CONV_CHANNELS, height, width, generator=draw),
            _between_pixels(torch.randn(batch, 18, height, width, generator=draw)),
            torch.randn(batch, 9, height, width, generator=draw).sigmoid(),
            torch.randn(CONV_CHANNELS, CONV_CHANNELS, 3, 3, generator=draw) / (9 * CONV_CHANNELS) ** 0.5,
        ]
        tensors = [t.to(device).requires_grad_() for t in tensors]
        problems.append(Problem(f"{height} x {width}", tensors, lambda kernel, tensors: kernel(*tensors)))
    return problems


def attention_problems(size: tuple[int, int], batch: int, device: str | torch.device) -> list[Problem]:
    """All levels at once, as a layer of the encoder sees them: points some pixels around every position."""
    sizes = pyramid(size)
    draw = torch.Generator().manual_seed(0)
    references = mask2former_pixel_decoder.pixel_centres(sizes)
    extents = torch.tensor([(width, height) for height, width in sizes])
    count = len(references)
    heads = (batch, count, HEADS, len(sizes), POINTS)
    values = torch.randn(batch, count, HEADS, HEAD_CHANNELS, generator=draw)
    offsets = _between_pixels(3 * torch.randn(*heads, 2, generator=draw)) / extents[:, None]
    weights = torch.randn(*heads, generator=draw).flatten(3).softmax(-1).view(heads)
    tensors = [values, references[:, None, None, None] + offsets, weights]

    def run(kernel: Kernel, tensors: list[Tensor]) -> Tensor:
        values, locations, weights = tensors
        return kernel(values, sizes, locations, weights)

    def reduce(tensors: list[Tensor]) -> list[Tensor]:
        values, locations, weights = tensors
        return [values, locations[:, ::COMPARED_QUERIES], weights[:, ::COMPARED_QUERIES]]

    label = " + ".join(f"{height} x {width}" for height, width in sizes)
    return [Problem(label, [t.to(device).requires_grad_() for t in tensors], run, reduce)]


OPERATORS = {
    "conv": Operator(
        "Deformable convolution",
        f"{CONV_CHANNELS} channels",
        deform_conv,
        deformable_conv.get_kernel,
        ("torchvision", "mmcv"),
        conv_problems,
    ),
    "attention": Operator(
        "Multi-scale deformable attention",
        f"{HEADS} heads of {HEAD_CHANNELS} channels, {POINTS} points in each level",
        ms_deform_attn,
        mask2former_pixel_decoder.get_kernel,
        ("mmcv",),
        attention_problems,
    ),
}
