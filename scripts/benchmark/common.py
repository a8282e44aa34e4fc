"""What the benchmarks share: timing in turns, peak memory, random networks, tables and a picture."""

from __future__ import annotations

import argparse
import gc
import io
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from itertools import pairwise
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from pem_lightning.models.backbones import BACKBONES
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.pem import PEM, build_pem
from pem_lightning.processes import Interrupted, start_worker
from scripts.benchmark.runner import peak_memory

T = TypeVar("T")
NUM_CLASSES = 19  # of Cityscapes
KEPT_QUERIES = 30
TOTAL = "total"
Lap = Callable[[str], None]  # ends a stage, by its name
Times = dict[str, list[float]]  # stage, or `TOTAL` -> seconds of every round


def time_in_turns(
    tasks: Mapping[str, Callable[[Lap], object]], rounds: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, Times]:
    """Run every task once per round; each round starts with the next task, so that none is always first.

    The machine's drift then meets all tasks, and cancels in ratios within a round. Garbage is not collected meanwhile.
    """
    times: dict[str, Times] = {name: {} for name in tasks}
    names = list(tasks)
    for turn in range(-warmup, rounds):
        say("warming up" if turn < 0 else f"round {turn + 1} of {rounds}")
        first = (turn + warmup) % len(names)
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                for stage, seconds in time_once(tasks[name], device).items():
                    if turn >= 0:
                        times[name].setdefault(stage, []).append(seconds)
        finally:
            gc.enable()
    return times


def time_once(task: Callable[[Lap], object], device: str) -> dict[str, float]:
    """Seconds of a task's stages, and `TOTAL`. On a GPU by events in the stream: no stage waits for the host."""
    cuda = device == "cuda"
    marks: list[tuple[str, Any]] = []

    def lap(stage: str) -> None:
        marks.append((stage, torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()))
        if cuda:
            marks[-1][1].record()

    lap("start")
    task(lap)
    lap(TOTAL)
    if cuda:
        torch.cuda.synchronize()
    seconds: dict[str, float] = {}
    for (_, start), (stage, end) in [*pairwise(marks), (marks[0], marks[-1])]:
        taken = start.elapsed_time(end) / 1000 if cuda else end - start
        seconds[stage] = taken + (seconds.get(stage, 0.0) if stage != TOTAL else 0.0)
    return seconds


def quartiles(values: Sequence[float], scale: float = 1.0) -> str:
    """Median, and quartiles in brackets."""
    low, median, high = (number(scale * value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    return f"{median} ({low} to {high})"


def number(value: float | np.floating) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def ratios(numerator: Times, denominator: Times, stage: str = TOTAL) -> list[float]:
    """Quotients of what was measured in the same round."""
    return [a / b for a, b in zip(numerator[stage], denominator[stage], strict=True)]


def added_memory(job: Callable[..., object], *arguments: Any) -> str:
    """The most MiB that a job adds to a fresh process: allocated on a GPU, or else resident."""
    return f"{in_fresh_process(_run_and_measure, job, arguments, torch.get_num_threads()):.0f}"


def in_fresh_process(job: Callable[..., T], *arguments: Any) -> T:
    """What a job returns that runs in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn"), start_worker) as pool:
        running = pool.submit(job, *arguments)
        try:
            return running.result()
        except Interrupted:
            for process in active_children():
                process.terminate()  # or the pool would wait for it
            raise


def _run_and_measure(job: Callable[..., object], arguments: tuple[Any, ...], threads: int) -> float:
    torch.set_num_threads(threads)
    before = peak_memory()
    job(*arguments)
    return torch.cuda.max_memory_allocated() / 2**20 or peak_memory() - before


def random_network(backbone: str) -> PEM:
    """The paper's network with random weights that behave like trained ones, in evaluation mode, on the CPU.

    Offsets come to about a pixel and normalisation has the statistics of noise; a new network would sample the regular
    grid, and its activations would grow from layer to layer.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_pem(backbone, num_classes=NUM_CLASSES).train()
        for module in network.modules():
            if isinstance(module, DeformableConv):
                nn.init.kaiming_uniform_(module.offset.weight, a=5**0.5)
        norms = {m: m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)}
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            network(torch.randn(4, 3, 128, 256))
        for norm, momentum in norms.items():
            norm.momentum = momentum
    return network.eval()


def choose_threshold(class_logits: Float[Tensor, "Q _"]) -> float:
    """A class probability that `KEPT_QUERIES` exceed, half-way to the next: a random network is never sure."""
    scores, labels = class_logits.softmax(-1).max(-1)
    scores = scores[labels != class_logits.shape[-1] - 1].sort(descending=True).values
    count = min(KEPT_QUERIES, len(scores)) or 1
    return float(nn.functional.pad(scores, (0, 2))[count - 1 : count + 1].mean())


def other_library(device: str) -> AbstractContextManager[Any]:
    """A context with another library behind the convolutions, which shows what rounding alone does."""
    if device == "cuda":
        return torch.backends.cudnn.flags(enabled=False)
    return torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)


def add_arguments(
    parser: argparse.ArgumentParser, size: tuple[int, int], batch: int, precisions: Sequence[str]
) -> None:
    """Options of what compares our path with the reference."""
    switch: Any = {"action": argparse.BooleanOptionalAction, "default": True}
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["stdc1", "resnet50"], help="of PEM")
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=["float32"], help="to compare")
    parser.add_argument("--size", type=parse_size, default=size, help="HEIGHTxWIDTH of the images")
    parser.add_argument("--batch", type=positive, default=batch, help="images at once")
    parser.add_argument("--memory", **switch, help="in fresh processes")
    parser.add_argument("--equality", **switch, help="with the reference")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def parse_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= 32):
        raise argparse.ArgumentTypeError(f"{text}: give HEIGHTxWIDTH of 32 pixels or more, such as 1024x2048")
    return int(height), int(width)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def describe(facts: str, options: argparse.Namespace) -> str:
    """The head of a report: what times depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    processor = cpuinfo.split("model name")[-1].splitlines()[0].strip("\t :") if cpuinfo else platform.processor()
    device = torch.cuda.get_device_name() if options.device == "cuda" else processor
    load = f", load before {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return (
        f"{facts}. {device}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}, torch {torch.__version__}, "
        f"rounds: {options.rounds}{load}. Medians and quartiles; ratios are taken within a round."
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, all columns but the first aligned at the right."""
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(times: Mapping[str, Times], title: str) -> bytes:
    """A bar per task of its stages' medians; returns a PNG."""
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(times)), dpi=120, layout="constrained")
    axes = figure.subplots()
    starts = np.zeros(len(times))
    for stage in dict.fromkeys(stage for one in times.values() for stage in one if stage != TOTAL):
        widths = np.array([1000 * np.median(one.get(stage, 0.0)) for one in times.values()])
        bars = axes.barh(list(times), widths, left=starts, height=0.62, label=stage)
        starts += widths
    axes.bar_label(bars, [f"{number(1000 * np.median(one[TOTAL]))} ms" for one in times.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds, medians")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()
