"""Measuring networks against one another: time, memory, operations, and whether they agree.

`measure_interleaved` times any callables; `run_benchmark` is what scripts/benchmark.py does.
"""

from pem_lightning.benchmark.contestants import Contestant, Fast, Library, Straightforward
from pem_lightning.benchmark.job import run_benchmark, time_contestants
from pem_lightning.benchmark.memory import Memory, measure_child, measure_own, print_memory
from pem_lightning.benchmark.plot import draw_latencies, draw_steps
from pem_lightning.benchmark.report import to_markdown
from pem_lightning.benchmark.settings import Settings, parse_size
from pem_lightning.benchmark.timing import Clock, Spread, Timing, measure_interleaved, paired_ratio
from pem_lightning.benchmark.weights import Weights, checkpoint_weights, random_weights

__all__ = [
    "Clock",
    "Contestant",
    "Fast",
    "Library",
    "Memory",
    "Settings",
    "Spread",
    "Straightforward",
    "Timing",
    "Weights",
    "checkpoint_weights",
    "draw_latencies",
    "draw_steps",
    "measure_child",
    "measure_interleaved",
    "measure_own",
    "paired_ratio",
    "parse_size",
    "print_memory",
    "random_weights",
    "run_benchmark",
    "time_contestants",
    "to_markdown",
]
