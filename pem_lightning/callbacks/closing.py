"""The last lines of a run: how it went, where everything is, what to do next. Each is a word and a text."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning import Trainer

from pem_lightning.callbacks.loggers import readable
from pem_lightning.callbacks.measures import Throughput
from pem_lightning.config import key_of

Line = tuple[str, str]

PLACES = {
    "checkpoints": "checkpoints",
    "curves": "curves.png",
    "overlays": "panels",
    "worst images": "worst",
    "confusion": "confusion.png",
    "numbers": "metrics.json",
}
"""What is in a run's folder."""


def course(trainer: Trainer, monitor: str, best: tuple[float, int] | None) -> list[Line]:
    """How long, how fast, how well.

    Args:
        trainer: after training; without a `Throughput` among its callbacks nobody knows how long and how fast.
        monitor: the task's metric.
        best: its best value in percent, and the step.
    """
    lines = []
    for measured in (c for c in cast(Any, trainer).callbacks if isinstance(c, Throughput)):
        watch, wait = measured.watch, measured.data_wait_percent
        took = f"{_clock(watch.training + watch.validating)} for {watch.steps} steps"
        lines.append(("time", f"{took}, of which validation {_clock(watch.validating)}"))
        waiting = "" if wait is None else f", {wait:.1f} % of the time waiting for data"
        lines.append(("speed", f"{watch.images / max(watch.training, 1e-9):.1f} images/s{waiting}"))
    if best is not None:
        lines.append(("best", f"{monitor.removeprefix('val/')} {best[0]:.1f} at step {best[1]}"))
    return lines


def places(directory: Path) -> list[Line]:
    """Where everything is, of what there is."""
    paths = {what: directory / name for what, name in PLACES.items()}
    return [(what, readable(path)) for what, path in paths.items() if path.exists()]


def next_steps(trainer: Trainer, directory: Path, overrides: Sequence[str]) -> list[Line]:
    """The commands to go on with.

    Args:
        trainer: after training.
        directory: the run's.
        overrides: the command line's part of the experiment.
    """
    lines = []
    best, last = (directory / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if last.exists():
        own = [o for o in overrides if key_of(o) not in ("resume", "weights", "recipe.max_steps")]
        done = trainer.global_step >= trainer.max_steps > 0
        longer = [o for o in overrides if key_of(o) == "recipe.max_steps"]
        steps = [f"recipe.max_steps={2 * trainer.max_steps}"] if done else longer
        command = shlex.join(["python", "train.py", *own, *steps, f"resume={readable(last)}"])
        lines.append(("train longer" if done else "go on", command))
    for path in [path for path in (best, last) if path.exists()][:1]:
        checkpoint = shlex.quote(f"checkpoint={readable(path)}")
        lines.append(("evaluate", f"python evaluate.py {checkpoint}"))
        lines.append(("predict", f"python predict.py {checkpoint} input=IMAGE"))
    return lines


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
