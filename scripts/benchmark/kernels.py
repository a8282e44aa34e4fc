"""Kernels of the deformable operators at the sizes of the pixel decoder's pyramid: forward, and with backward.

That they agree is tested (tests/models); here they are timed one after the other by `torch.utils.benchmark`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

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
Problem = tuple[str, Callable[[Kernel], Tensor], list[Tensor]]  # name, kernel -> output, what takes gradients


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=common.parse_size, default=(1024, 2048), help="HEIGHTxWIDTH of the image")
    parser.add_argument("--batch", type=common.positive, default=1, help="images at once")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Returns a report, and no times by stage."""
    height, width = padded_size(*options.size)
    levels = [(height // stride, width // stride) for stride in (32, 16, 8)]
    conv = installed(deform_conv, deformable_conv.get_kernel, "torchvision", "mmcv")
    attention = installed(ms_deform_attn, mask2former_pixel_decoder.get_kernel, "mmcv")
    problems = [(problem, conv) for problem in conv_problems(levels, options)]
    problems.append((attention_problem(levels, options), attention))
    rows = []
    for problem, kernels in problems:
        for name, kernel in kernels.items():
            common.say(f"{problem[0]}: {name}")
            rows.append((problem[0], name, *measure(problem, kernel, options.rounds)))
    facts = f"Kernels of deformable operators, {height}x{width}, batch {options.batch}"
    columns = ("operator", "kernel", "forward, ms (IQR)", "with backward, ms (IQR)")
    return f"{common.describe(facts, options)}\n\n{common.table(columns, rows)}\n", {}


def measure(problem: Problem, kernel: Kernel, rounds: int) -> list[str]:
    """Median and interquartile range, forward and with backward, of at least a fifth of a second per round."""
    _, compute, tensors = problem

    def forward() -> None:
        with torch.no_grad():
            compute(kernel)

    def both() -> None:
        torch.autograd.grad(compute(kernel).sum(), tensors)

    found = []
    for work in (forward, both):
        timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
        times = timer.blocked_autorange(min_run_time=0.2 * rounds)
        found.append(f"{common.number(1000 * times.median)} ({common.number(1000 * times.iqr)})")
    return found


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
        yield f"convolution {height}x{width}", partial(_apply, tensors), tensors


def _apply(tensors: list[torch.Tensor], kernel: Kernel) -> torch.Tensor:
    return kernel(*tensors)


def attention_problem(levels: list[tuple[int, int]], options: argparse.Namespace) -> Problem:
    """All levels at once, as a layer of Mask2Former's encoder sees them: points some pixels around every position."""
    draw = torch.Generator().manual_seed(0)
    centres = mask2former_pixel_decoder.pixel_centres(levels)
    sides = torch.tensor([(width, height) for height, width in levels])
    shape = (options.batch, len(centres), HEADS, len(levels), POINTS)
    values = torch.randn(options.batch, len(centres), HEADS, HEAD_CHANNELS, generator=draw)
    points = centres[:, None, None, None] + 3 * torch.randn(*shape, 2, generator=draw) / sides[:, None]
    weights = torch.randn(*shape, generator=draw).flatten(3).softmax(-1).view(shape)
    values, points, weights = tensors = [t.to(options.device).requires_grad_() for t in (values, points, weights)]
    return "attention, all levels", lambda kernel: kernel(values, levels, points, weights), tensors
