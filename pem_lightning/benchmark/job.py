"""The whole benchmark, and its result as plain containers: milliseconds, MiB, and the spread over the rounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from jaxtyping import Float
from torch import Tensor

from pem_lightning.benchmark.contestants import (
    POSTPROCESSING,
    Contestant,
    PEMContestant,
    Straightforward,
)
from pem_lightning.benchmark.equality import compare, observe, other_library
from pem_lightning.benchmark.kernels import benchmark_kernels
from pem_lightning.benchmark.lineup import build_all, line_up, set_threads
from pem_lightning.benchmark.memory import measure_child
from pem_lightning.benchmark.roofline import Ceilings, bound, estimate_bytes, measure_ceilings
from pem_lightning.benchmark.settings import Settings, describe_environment, load_images
from pem_lightning.benchmark.timing import Spread, Task, Timing, measure_interleaved, paired_ratio
from pem_lightning.inference.postprocess import size_of
from pem_lightning.types import UserError

Say = Callable[[str], None]
ChildCommand = Callable[[str, float], Sequence[str]]
"""(contestant's name, threshold) -> a command that measures its memory and ends in `memory.print_memory`"""


def run_benchmark(
    settings: Settings, *, command: str = "", child_command: ChildCommand | None = None, say: Say = lambda line: None
) -> dict[str, Any]:
    """Measure everything that is asked for.

    Args:
        settings: what.
        command: the command line, for the record.
        child_command: how to measure memory in a fresh process; None leaves memory out.
        say: is told what happens.

    Returns:
        Plain containers, of which `report` and `plot` make tables and a picture.

    Raises:
        UserError: an input cannot be read, or nobody takes part.
    """
    device = settings.torch_device
    set_threads(settings.threads)
    result: dict[str, Any] = {
        "environment": describe_environment(device, command),
        "settings": {k: str(v) if k in ("checkpoint", "image") and v else v for k, v in asdict(settings).items()},
    }
    images = load_images(settings)
    contestants, skipped = build_all(line_up(settings), images, settings, say)
    if not contestants:
        reasons = "; ".join(skipped.values()) or "--contestants and --peers are empty"
        raise UserError(f"nobody takes part: {reasons}")
    timings = time_contestants(contestants, images, rounds=settings.rounds, warmup=settings.warmup, say=say)
    say("measuring the device, counting operations and bytes")
    ceilings = measure_ceilings(device, dict.fromkeys(c.precision for c in contestants), settings.small_ceilings)
    result["ceilings"] = ceilings._asdict()
    rows = {c.name: summarize(c, timings, images, ceilings) for c in contestants}
    if settings.memory and child_command is not None:
        for c in contestants:
            say(f"memory of {c.name}")
            memory = measure_child(child_command(c.name, c.threshold))
            rows[c.name]["memory"] = {"failed": memory} if isinstance(memory, str) else memory.to_dict()
    result |= {"contestants": list(rows.values()), "skipped": skipped}
    if settings.equality:
        result["equality"] = compare_paths(contestants, images, say)
    if settings.kernels:
        result["kernels"] = benchmark_kernels(
            settings.size, batch=settings.batch, device=device, rounds=settings.rounds, warmup=settings.warmup, say=say
        )
    return result


def time_contestants(
    contestants: Sequence[Contestant],
    images: Float[Tensor, "B 3 H W"],
    *,
    rounds: int = 5,
    warmup: int = 1,
    say: Say = lambda line: None,
) -> dict[str, Timing]:
    """Time contestants against one another, and each task of their post-processing on its own.

    Returns:
        By name, and by `part_name` for the tasks.
    """
    size = size_of(images)

    def whole(c: Contestant) -> Task:
        return lambda clock: c.run(images, clock)

    def part(c: Contestant, output: Any, name: str) -> Task:
        return lambda clock: c.postprocess(output, size, (name,))

    tasks: dict[str, Task] = {}
    for c in contestants:
        tasks[c.name] = whole(c)
        if len(c.tasks) > 1:
            output = c.keep(c.run(images))
            tasks |= {part_name(c.name, name): part(c, output, name) for name in c.tasks}
    return measure_interleaved(tasks, rounds=rounds, warmup=warmup, device=images.device, progress=say)


def part_name(contestant: str, task: str) -> str:
    """Under which name a task's post-processing alone is timed."""
    return f"{contestant}: {task} alone"


def summarize(
    c: Contestant, timings: Mapping[str, Timing], images: Float[Tensor, "B 3 H W"], ceilings: Ceilings
) -> dict[str, Any]:
    """Everything about one contestant but its memory."""
    timing, (batch, _, height, width) = timings[c.name], images.shape
    parts = {name: timings[part_name(c.name, name)].total for name in c.tasks if len(c.tasks) > 1}
    parts = parts or {c.tasks[0]: timing.stages[POSTPROCESSING]}
    network = [total - post for total, post in zip(timing.total, timing.stages[POSTPROCESSING], strict=True)]
    baseline = timings.get(c.baseline)
    gmacs, moved = c.gmacs(height, width), float(estimate_bytes(c.uncompiled().predict, images))
    least = bound(2e9 * gmacs * batch, moved, ceilings, c.precision)
    return {
        "name": c.name,
        "kind": type(c).__name__.lower(),
        "precision": c.precision,
        "compile": getattr(c, "compile", None),
        "baseline": c.baseline if baseline else None,
        "weights": c.source,
        "tasks": list(c.tasks),
        "note": c.note,
        "latency_ms": _ms(timing.total),
        "rounds_ms": [1000 * seconds for seconds in timing.total],
        "images_per_s": batch / Spread.of(timing.total).median,
        "speedup": paired_ratio(baseline.total, timing.total)._asdict() if baseline else None,
        "semantic_only_ms": _ms([a + b for a, b in zip(network, parts["semantic"], strict=True)]),
        "stages_ms": {name: _ms(seconds) for name, seconds in timing.stages.items()},
        "tasks_ms": {name: _ms(seconds) for name, seconds in parts.items()},
        "gmacs": gmacs,
        "parameters_m": sum(p.numel() for p in c.network.parameters()) / 1e6,
        "threshold": c.threshold,
        "kept_queries": c.kept_queries,
        "network_ms": _ms(network),
        "roofline": {
            "gbytes": moved / 1e9,
            "least_ms": 1000 * least.seconds,
            "bound_by": least.by,
            "reached": least.seconds / Spread.of(network).median,
        },
    }


def compare_paths(
    contestants: Sequence[Contestant], images: Float[Tensor, "B 3 H W"], say: Say = lambda line: None
) -> list[dict[str, Any]]:
    """Compare every fast path, and the straightforward one with another library, with the straightforward one."""
    rows = []
    for reference in contestants:
        if not isinstance(reference, Straightforward):
            continue
        say(f"comparing with {reference.name}")
        expected = observe(reference, images)
        description, context = other_library(images.device)
        with context:
            rows.append(
                {
                    "name": f"{reference.name} {description}",
                    "reference": reference.name,
                    **compare(observe(reference, images), expected).to_dict(),
                }
            )
        for c in contestants:
            if isinstance(c, PEMContestant) and c is not reference and c.baseline == reference.name:
                difference = compare(observe(c, images), expected)
                rows.append({"name": c.name, "reference": reference.name, **difference.to_dict()})
    return rows


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return Spread.of([1000 * s for s in seconds])._asdict()
