"""Measuring a training step against the straightforward one: what `scripts/benchmark.py --train` does."""

from pem_lightning.benchmark.training.job import run_training_benchmark, time_steps
from pem_lightning.benchmark.training.lineup import measure_memory
from pem_lightning.benchmark.training.report import to_markdown
from pem_lightning.benchmark.training.settings import TrainingSettings, draw_batch
from pem_lightning.benchmark.training.steps import OurStep, StraightforwardStep, TrainingStep

__all__ = [
    "OurStep",
    "StraightforwardStep",
    "TrainingSettings",
    "TrainingStep",
    "draw_batch",
    "measure_memory",
    "run_training_benchmark",
    "time_steps",
    "to_markdown",
]
