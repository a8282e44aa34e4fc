"""Kernels of the deformable operators at the sizes of the pixel decoder's pyramid: forward, and with backward.

Each is compared with its definition in float64, then timed by `torch.utils.benchmark`, one after the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from pem_lightning.models import deformable_conv, mask2former_pixel_decoder
from pem_lightning.models.deformable_conv import Kernel
from pem_lightning.models.pem import padded_size
from pem_lightning.types import UserError
from scripts.benchmark import common
from scripts.benchmark.common import Times
from scripts.benchmark.reference.deformable_attention import ms_deform_attn
from scripts.benchmark.reference.network import deform_conv

CHANNELS = 128
HEADS, HEAD_CHANNELS, POINTS = 8, 32, 4
Compute = Callable[[Kernel, Sequence[Tensor]], Tensor]  # kernel and what takes gradients -> output
Problem = tuple[str, Compute, list[Tensor]]  # name, and what takes gradients; the second of it are points


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=common.parse_size, default=(1024, 2048), help="HEIGHTxWIDTH of the image")
    parser.add_argument("--batch", type=common.positive, default=1, help="images at once")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Returns a report, and no times by stage."""
    height, width = padded_size(*options.size)
    facts = f"Kernels of deformable operators, {height}x{width}, batch {options.batch}"
    columns = ("operator", "kernel", "off float64", "points' gradients", "forward, ms (IQR)", "with backward, ms (IQR)")
    rows = [(name, kernel, f"{o:.1e}", f"{p:.1e}", *times) for name, kernel, o, p, *times in measure_all(options)]
    return f"{common.describe(facts, options)}\n\n{common.table(columns, rows)}\n", {}


def measure_all(options: argparse.Namespace) -> Iterator[tuple[str, str, float, float, str, str]]:
    """Operator, kernel, its two deviations and its two times."""
    height, width = padded_size(*options.size)
    levels = [(height // stride, width // stride) for stride in (32, 16, 8)]
    conv = installed(deform_conv, deformable_conv.get_kernel, "torchvision", "mmcv")
    attention = installed(ms_deform_attn, mask2former_pixel_decoder.get_kernel, "mmcv")
    problems = [(problem, conv) for problem in conv_problems(levels, options)]
    problems.append((attention_problem(levels, options), attention))
    for problem, kernels in problems:
        common.say(f"{problem[0]}: float64")
        exact = in_float64(problem, kernels["grid_sample"])
        for name, kernel in kernels.items():
            common.say(f"{problem[0]}: {name}")
            yield problem[0], name, *deviations(problem, kernel, exact), *measure(problem, kernel, options.rounds)


def in_float64(problem: Problem, definition: Kernel) -> list[Tensor]:
    """The output, and the gradients of its mean square."""
    _, compute, tensors = problem
    exact = [t.detach().double().requires_grad_() for t in tensors]
    return output_and_gradients(compute, definition, exact)


def deviations(problem: Problem, kernel: Kernel, exact: Sequence[Tensor]) -> tuple[float, float]:
    """Relative deviations, of norms: the largest of the output and most gradients, and that of the points' gradient.

    The latter jumps where a point is at a pixel's border, over which rounding moves some.
    """
    _, compute, tensors = problem
    found = output_and_gradients(compute, kernel, tensors)
    output, first, points, *others = (
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)
    )
    return max(output, first, *others), points


def output_and_gradients(compute: Compute, kernel: Kernel, tensors: Sequence[Tensor]) -> list[Tensor]:
    output = compute(kernel, tensors)
    return [output.detach(), *torch.autograd.grad(output.square().mean(), tensors)]


def measure(problem: Problem, kernel: Kernel, rounds: int) -> tuple[str, str]:
    """Median and interquartile range, forward and with backward, of at least a fifth of a second per round."""
    _, compute, tensors = problem

    def forward() -> None:
        with torch.no_grad():
            compute(kernel, tensors)

    def both() -> None:
        torch.autograd.grad(compute(kernel, tensors).sum(), tensors)

    found = []
    for work in (forward, both):
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        times = timer.blocked_autorange(min_run_time=0.2 * rounds)
        found.append(f"{common.number(1000 * times.median)} ({common.number(1000 * times.iqr)})")
    return found[0], found[1]


def installed(definition: Kernel, get_kernel: Callable[[str], Kernel], *libraries: str) -> dict[str, Kernel]:
    """The kernels that can be used here; says why others cannot."""
    kernels = {"torch": get_kernel("torch"), "grid_sample": definition}
    for name in libraries:
        try:
            kernels[name] = get_kernel(name)
        except UserError as error:
            common.say(f"skipped {name}: {error}")
    return kernels


def conv_problems(levels: list[tuple[int, int]], options: argparse.Namespace) -> Iterator[Problem]:
    """One per level: features, offsets of about a pixel, modulation and weights."""
    for height, width in levels:
        draw = torch.Generator().manual_seed(0)
        tensors = [
            torch.randn(options.batch, CHANNELS, height, width, generator=draw),
            torch.randn(options.batch, 18, height, width, generator=draw),
            torch.randn(options.batch, 9, height, width, generator=draw).sigmoid(),
            torch.randn(CHANNELS, CHANNELS, 3, 3, generator=draw) / (9 * CHANNELS) ** 0.5,
        ]
        tensors = [t.to(options.device).requires_grad_() for t in tensors]
        yield f"convolution {height}x{width}", lambda kernel, tensors: kernel(*tensors), tensors


def attention_problem(levels: list[tuple[int, int]], options: argparse.Namespace) -> Problem:
    """All levels at once, as a layer of Mask2Former's encoder sees them: points some pixels around every position."""
    draw = torch.Generator().manual_seed(0)
    centres = mask2former_pixel_decoder.pixel_centres(levels)
    sides = torch.tensor([(width, height) for height, width in levels])
    shape = (options.batch, len(centres), HEADS, len(levels), POINTS)
    values = torch.randn(options.batch, len(centres), HEADS, HEAD_CHANNELS, generator=draw)
    points = centres[:, None, None, None] + 3 * torch.randn(*shape, 2, generator=draw) / sides[:, None]
    weights = torch.randn(*shape, generator=draw).flatten(3).softmax(-1).view(shape)
    tensors = [t.to(options.device).requires_grad_() for t in (values, points, weights)]
    return "attention, all levels", lambda kernel, tensors: kernel(tensors[0], levels, *tensors[1:]), tensors
