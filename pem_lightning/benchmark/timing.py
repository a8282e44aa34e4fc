"""Timing that a drifting machine cannot bias: all contestants in turn, round after round, in one process.

A slow second, a hot processor or a neighbour then meets all contestants alike, and ratios are taken within a round.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Spread(NamedTuple):
    """Median, quartiles and extremes of some measurements, in their unit."""

    min: float
    low: float
    median: float
    high: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one measurement."""
        quantiles = torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist())


@dataclass
class Timing:
    """What one contestant took, in seconds, one entry per round.

    Attributes:
        total: from start to end.
        stages: the laps between, in their order.
    """

    total: list[float] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)

    def add(self, total: float, stages: Mapping[str, float]) -> None:
        """Append one round."""
        self.total.append(total)
        for name, seconds in stages.items():
            self.stages.setdefault(name, []).append(seconds)


class Clock:
    """Times one task and its stages. On a GPU it records events in the stream, so that no stage waits for the host."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin, once everything that was asked of the device before is done."""
        self._synchronize()
        self._marks = [("", self._now())]

    def lap(self, stage: str) -> None:
        """End a stage, which began where the one before ended. Laps of the same name add up."""
        self._marks.append((stage, self._now()))

    def stop(self) -> tuple[float, dict[str, float]]:
        """End; returns the seconds in all, and those of every stage."""
        end = self._now()
        self._synchronize()
        stages: dict[str, float] = {}
        for (_, before), (stage, after) in zip(self._marks, self._marks[1:], strict=False):
            stages[stage] = stages.get(stage, 0.0) + self._seconds(before, after)
        return self._seconds(self._marks[0][1], end), stages

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start


Task = Callable[[Clock], object]
"""What is timed. It may end stages by `clock.lap`."""


def measure_interleaved(
    tasks: Mapping[str, Task],
    *,
    rounds: int = 5,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Timing]:
    """Run every task once per round; the next round begins with the next task, so that none is always first.

    Args:
        tasks: by name.
        rounds: how often each is measured.
        warmup: rounds before them that are not measured.
        device: where the tasks compute.
        progress: is told of every round.
    """
    clock, names = Clock(device), list(tasks)
    timings = {name: Timing() for name in names}
    for turn in range(-warmup, rounds):
        progress("warming up" if turn < 0 else f"round {turn + 1} of {rounds}")
        first = (turn + warmup) % len(names) if names else 0
        for name in names[first:] + names[:first]:
            with _no_garbage_collection():
                clock.start()
                tasks[name](clock)
                total, stages = clock.stop()
            if turn >= 0:
                timings[name].add(total, stages)
    return timings


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Quotients of what was measured in the same round: drift between rounds cancels."""
    return Spread.of([a / b for a, b in zip(numerator, denominator, strict=True)])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
