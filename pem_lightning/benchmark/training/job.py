"""The whole benchmark of training, and its result as plain containers: milliseconds, MiB, spread over the rounds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pem_lightning.benchmark.lineup import set_threads
from pem_lightning.benchmark.memory import measure_child
from pem_lightning.benchmark.settings import describe_environment
from pem_lightning.benchmark.timing import Spread, Task, Timing, measure_interleaved, paired_ratio
from pem_lightning.benchmark.training.equality import compare_plans
from pem_lightning.benchmark.training.lineup import Plan, build_all, line_up, make_networks
from pem_lightning.benchmark.training.settings import TrainingSettings, draw_batch
from pem_lightning.benchmark.training.steps import TrainingStep
from pem_lightning.types import Batch, UserError

Say = Callable[[str], None]


def run_training_benchmark(
    settings: TrainingSettings,
    *,
    command: str = "",
    child_command: Callable[[str], Sequence[str]] | None = None,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Compare, then measure everything that is asked for.

    Args:
        settings: what.
        command: the command line, for the record.
        child_command: contestant's name -> a command that measures its memory in a fresh process and ends in
            `memory.print_memory`; None leaves memory out.
        say: is told what happens.

    Returns:
        Plain containers, of which `report` and `plot` make tables and a picture.

    Raises:
        UserError: nobody takes part, or ours does not compute what the straightforward path does.
    """
    device = settings.torch_device
    set_threads(settings.threads)
    plans, network, batch = line_up(settings), make_networks(settings), draw_batch(settings)
    if not plans:
        raise UserError("nobody takes part: --contestants, --backbones, --precisions or --compile is empty")
    result: dict[str, Any] = {
        "environment": describe_environment(device, command),
        "settings": asdict(settings),
    }
    steps, skipped = build_all(plans, network, batch, settings, say)
    result["equality"] = compare_plans(steps, network, batch, settings, say) if settings.equality else []
    timings = time_steps(steps, batch, rounds=settings.rounds, warmup=settings.warmup, say=say)
    rows = {plan: summarize(plan, step, timings, batch) for plan, step in steps.items()}
    if settings.memory and child_command is not None:
        for plan, row in rows.items():
            say(f"memory of {plan.name}")
            memory = measure_child(child_command(plan.name))
            row["memory"] = {"failed": memory} if isinstance(memory, str) else memory.to_dict()
    return result | {"steps": list(rows.values()), "skipped": skipped}


def time_steps(
    steps: Mapping[Plan, TrainingStep], batch: Batch, *, rounds: int = 5, warmup: int = 1, say: Say = lambda line: None
) -> dict[str, Timing]:
    """Time steps against one another, by contestants' names. All go on learning from one batch."""

    def task(step: TrainingStep) -> Task:
        return lambda clock: step.run(batch, clock)

    tasks = {plan.name: task(step) for plan, step in steps.items()}
    return measure_interleaved(tasks, rounds=rounds, warmup=warmup, device=batch.images[0].device, progress=say)


def summarize(plan: Plan, step: TrainingStep, timings: Mapping[str, Timing], batch: Batch) -> dict[str, Any]:
    """Everything about one contestant but its memory."""
    timing, baseline = timings[plan.name], timings.get(plan.baseline)
    return {
        "name": plan.name,
        **asdict(plan),
        "baseline": plan.baseline if baseline else None,
        "optimizer": step.describe_optimizer(),
        "parameters_m": sum(p.numel() for p in step.network.parameters()) / 1e6,
        "step_ms": _ms(timing.total),
        "rounds_ms": [1000 * seconds for seconds in timing.total],
        "ratio": paired_ratio(timing.total, baseline.total)._asdict() if baseline else None,
        "images_per_s": len(batch.images) / Spread.of(timing.total).median,
        "stages_ms": {name: _ms(seconds) for name, seconds in timing.stages.items()},
        "stage_ratios": {
            name: paired_ratio(seconds, baseline.stages[name])._asdict() for name, seconds in timing.stages.items()
        }
        if baseline
        else {},
        "host_synchronisations": count_synchronisations(lambda: step.run(batch), step.device),
    }


def count_synchronisations(work: Callable[[], object], device: torch.device) -> int | None:
    """How often the host waits for a GPU during some work; None where there is no GPU to wait for."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def _ms(seconds: Sequence[float]) -> dict[str, float]:
    return Spread.of([1000 * s for s in seconds])._asdict()
