"""Peak memory of one contestant, alone in a fresh process, because a process never shows what it has given back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

MIB = 2**20
_MARK = "memory: "


class Memory(NamedTuple):
    """In MiB.

    Attributes:
        base: before the contestant was built: interpreter and libraries on a CPU, nothing on a GPU.
        peak: the most there was until it was done.
    """

    base: float
    peak: float

    @property
    def increase(self) -> float:
        """What the contestant added: weights, activations and results."""
        return self.peak - self.base

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return {**self._asdict(), "increase": self.increase}


def high_water_mark(device: str | torch.device = "cpu") -> float:
    """The most memory this process has held, in MiB: resident on a CPU, allocated by PyTorch on a GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    status = Path("/proc/self/status")
    if status.is_file():
        # Not `ru_maxrss`, which Linux hands down to a new program: a small child of a large parent would look large.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def measure_own(job: Callable[[], object], device: str | torch.device = "cpu") -> Memory:
    """Run a job in this process, which must be fresh: builds a contestant and runs it once."""
    base = high_water_mark(device)
    job()
    return Memory(base, high_water_mark(device))


def print_memory(memory: Memory) -> None:
    """Tell the parent process."""
    print(_MARK + json.dumps(memory._asdict()), flush=True)


def measure_child(command: Sequence[str]) -> Memory | str:
    """Run a command that ends in `print_memory`.

    Returns:
        What it measured, or why it did not, in one line.
    """
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in child.stdout.splitlines():
        if line.startswith(_MARK):
            return Memory(**json.loads(line.removeprefix(_MARK)))
    if child.returncode < 0:
        return f"the process was killed by signal {-child.returncode}, which is how too little memory shows"
    lines = child.stderr.strip().splitlines()
    return lines[-1] if lines else f"the process ended with exit code {child.returncode}"
