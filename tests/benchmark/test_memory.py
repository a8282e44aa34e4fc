import sys
from pathlib import Path

import pytest
import torch

from pem_lightning.benchmark.memory import Memory, high_water_mark, measure_child, measure_own

ROOT = Path(__file__).parents[2]
CHILD = (
    "import sys; sys.path.insert(0, {root!r})\n"
    "from pem_lightning.benchmark.memory import measure_own, print_memory\n"
    "import torch\n"
    "print('something else')\n"
    "print_memory(measure_own(lambda: torch.ones({mib}, 2**18)))\n"
)


def run(mib: int):
    return measure_child([sys.executable, "-c", CHILD.format(root=str(ROOT), mib=mib)])


@pytest.mark.slow
def test_a_child_sees_its_own_memory_and_not_its_parents():
    ballast = torch.ones(600, 2**18)  # 600 MiB
    memory = run(64)
    assert isinstance(memory, Memory)
    assert memory.increase == pytest.approx(64, abs=16)
    if Path("/proc/self/status").is_file():
        assert high_water_mark() > 600
        # A small program started by a large one would inherit the large one's `ru_maxrss`.
        assert memory.base < high_water_mark() - 0.5 * ballast.nbytes / 2**20


def test_the_peak_is_kept_after_memory_is_given_back():
    memory = measure_own(lambda: torch.ones(32, 2**18).sum())
    assert memory.peak >= memory.base


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_child_that_fails_says_why_in_one_line(program, reason):
    outcome = measure_child([sys.executable, "-c", program])
    assert isinstance(outcome, str)
    assert reason in outcome
    assert "\n" not in outcome
