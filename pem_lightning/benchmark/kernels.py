"""The deformable convolution's kernels against one another, at the three sizes of the pixel decoder's pyramid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pem_lightning.benchmark.timing import Clock, Spread, measure_interleaved
from pem_lightning.errors import UserError
from pem_lightning.networks.deformable_conv import Kernel, get_kernel
from pem_lightning.networks.pem import padded_size
from pem_lightning.straightforward.network import deform_conv

STRIDES = (32, 16, 8)
CHANNELS = 128
REFERENCE = "grid_sample"


def installed_kernels() -> tuple[dict[str, Kernel], dict[str, str]]:
    """The kernels that can be used here, and why the others cannot."""
    kernels: dict[str, Kernel] = {"torch": get_kernel("torch"), REFERENCE: deform_conv}
    missing = {}
    for name in ("torchvision", "mmcv"):
        try:
            kernels[name] = get_kernel(name)
        except UserError as error:
            missing[name] = str(error)
    return kernels, missing


def draw_inputs(
    height: int, width: int, *, batch: int = 1, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Features, offsets of about a pixel, modulation and weights, all of which take gradients."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(batch, CHANNELS, height, width, generator=draw)
    offsets = torch.randn(batch, 18, height, width, generator=draw)
    mask = torch.randn(batch, 9, height, width, generator=draw).sigmoid()
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, generator=draw) / (9 * CHANNELS) ** 0.5
    return [t.to(device, dtype).requires_grad_() for t in (x, offsets, mask, weight)]


def benchmark_kernels(
    size: tuple[int, int], *, batch: int, device: str | torch.device, rounds: int, warmup: int
) -> dict[str, Any]:
    """Time all kernels forward, and forward with backward, and compare them in float64.

    Args:
        size: of the image; the pyramid works at 1/32, 1/16 and 1/8 of it.
        batch: images at once.
        device: where.
        rounds: measurements of each.
        warmup: rounds before them.

    Returns:
        Plain containers, as they go into the report.
    """
    kernels, missing = installed_kernels()
    rows = []
    for stride in STRIDES:
        height, width = (side // stride for side in padded_size(*size))
        inputs = draw_inputs(height, width, batch=batch, device=device)
        tasks = {}
        for name, kernel in kernels.items():
            tasks[name, "forward"] = _forward(kernel, inputs)
            tasks[name, "training"] = _forward_and_backward(kernel, inputs)
        named = {f"{name} {kind}": task for (name, kind), task in tasks.items()}
        timings = measure_interleaved(named, rounds=rounds, warmup=warmup, device=device)
        differences = largest_differences(kernels, height, width, device)
        for name in kernels:
            forward, training = (
                {k: 1000 * v for k, v in Spread.of(timings[f"{name} {kind}"].total)._asdict().items()}
                for kind in ("forward", "training")
            )
            rows.append(
                {
                    "kernel": name,
                    "height": height,
                    "width": width,
                    "forward_ms": forward,
                    "forward_backward_ms": training,
                    "float64_difference": differences[name],
                }
            )
    return {"channels": CHANNELS, "batch": batch, "reference": REFERENCE, "rows": rows, "missing": missing}


def largest_differences(
    kernels: dict[str, Kernel], height: int, width: int, device: str | torch.device
) -> dict[str, float]:
    """Largest deviation of every kernel's output and gradients from the reference's, in float64."""
    inputs = draw_inputs(height, width, device=device, dtype=torch.float64)
    expected = _outcome(kernels[REFERENCE], inputs)
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(_outcome(kernel, inputs), expected, strict=True))
        for name, kernel in kernels.items()
    }


def _outcome(kernel: Kernel, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of its mean square, scaled so that their magnitude does not depend on the size."""
    out = kernel(*inputs)
    return [out.detach(), *torch.autograd.grad(out.square().sum() / 2, inputs)]


def _forward(kernel: Kernel, inputs: list[Tensor]) -> Callable[[Clock], object]:
    def task(clock: Clock) -> None:
        with torch.no_grad():
            kernel(*inputs)

    return task


def _forward_and_backward(kernel: Kernel, inputs: list[Tensor]) -> Callable[[Clock], object]:
    def task(clock: Clock) -> None:
        torch.autograd.grad(kernel(*inputs).sum(), inputs)

    return task
