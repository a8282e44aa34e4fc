"""The deformable operators' kernels against one another, at the sizes of the pixel decoder's pyramid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pem_lightning.benchmark.operators import OPERATORS, REFERENCE, Problem
from pem_lightning.benchmark.timing import Clock, Spread, Timing, measure_interleaved
from pem_lightning.models.deformable_conv import Kernel


def benchmark_kernels(
    size: tuple[int, int],
    *,
    batch: int,
    device: str | torch.device,
    rounds: int,
    warmup: int,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Time all kernels forward, and forward with backward, and compare them in float64.

    Args:
        size: of the image; the pyramid works at 1/32, 1/16 and 1/8 of it.
        batch: images at once.
        device: where.
        rounds: measurements of each.
        warmup: rounds before them.
        say: is told what is going on.

    Returns:
        Per operator plain containers, as they go into the report.
    """
    sections = []
    for operator in OPERATORS.values():
        say(f"comparing kernels: {operator.name.lower()}")
        kernels, missing = operator.installed()
        rows: list[dict[str, Any]] = []
        for problem in operator.problems(size, batch, device):
            rows += _measure(kernels, problem, rounds=rounds, warmup=warmup, device=device)
        section = {"operator": operator.name, "note": operator.note, "batch": batch, "reference": REFERENCE}
        sections.append({**section, "rows": rows, "missing": missing})
    return sections


def _measure(
    kernels: Mapping[str, Kernel], problem: Problem, *, rounds: int, warmup: int, device: str | torch.device
) -> list[dict[str, Any]]:
    tasks = {}
    for name, kernel in kernels.items():
        tasks[f"{name} forward"] = _forward(kernel, problem)
        tasks[f"{name} training"] = _forward_and_backward(kernel, problem)
    timings = measure_interleaved(tasks, rounds=rounds, warmup=warmup, device=device)
    differences = largest_differences(kernels, problem)
    return [
        {
            "kernel": name,
            "size": problem.label,
            "forward_ms": _milliseconds(timings[f"{name} forward"]),
            "forward_backward_ms": _milliseconds(timings[f"{name} training"]),
            "float64_difference": differences[name],
        }
        for name in kernels
    ]


def _milliseconds(timing: Timing) -> dict[str, float]:
    return {name: 1000 * seconds for name, seconds in Spread.of(timing.total)._asdict().items()}


def largest_differences(kernels: Mapping[str, Kernel], problem: Problem) -> dict[str, float]:
    """Largest deviation of every kernel's output and gradients from the reference's, in float64."""
    tensors = problem.in_float64()
    expected = _outcome(kernels[REFERENCE], problem, tensors)
    return {
        name: max(float((a - b).abs().max()) for a, b in zip(_outcome(kernel, problem, tensors), expected, strict=True))
        for name, kernel in kernels.items()
    }


def _outcome(kernel: Kernel, problem: Problem, tensors: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of half its square."""
    out = problem.run(kernel, tensors)
    return [out.detach(), *torch.autograd.grad(out.square().sum() / 2, tensors)]


def _forward(kernel: Kernel, problem: Problem) -> Callable[[Clock], object]:
    def task(clock: Clock) -> None:
        with torch.no_grad():
            problem.run(kernel, problem.tensors)

    return task


def _forward_and_backward(kernel: Kernel, problem: Problem) -> Callable[[Clock], object]:
    def task(clock: Clock) -> None:
        torch.autograd.grad(problem.run(kernel, problem.tensors).sum(), problem.tensors)

    return task
