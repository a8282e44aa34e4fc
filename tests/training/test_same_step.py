"""A step is the same whoever computes which of its images: losses, gradients and the weights after it.

In float64, in which batch normalisation's gradients, which are ill-conditioned, can be compared to many digits; in
float32 as one vector.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

SEEDS = (0, 1, 2)  # of networks in float32

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """Devices, micro-batches and mode of batch normalisation -> what `train_one_step` saw."""
    folder = tmp_path_factory.mktemp("steps")
    cases = {1: ["1-train", "1-eval", "2-eval", "2-train", "4-eval"], 2: ["1-train", "1-eval", "2-eval"]}
    for n in cases:
        cases[n] += [f"{case}-float32-{seed}" for case in ("1-train", "1-eval", "2-eval") for seed in SEEDS]
    command = [sys.executable, "-m", "tests.training.train_one_step"]
    running = [
        subprocess.Popen([*command, str(n), str(folder), *names], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for n, names in cases.items()
    ]
    for process in running:
        _, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def distance(ours, others):
    """Of two sets of tensors, relative to the length of the second as one vector."""
    assert ours.keys() == others.keys()
    length = torch.stack([others[name].double().norm() for name in others]).norm()
    return (torch.stack([(ours[name].double() - others[name].double()).norm() for name in ours]).norm() / length).item()


@pytest.mark.parametrize(
    ("split", "whole"),
    [
        pytest.param("2-1-train", "1-1-train", id="two processes, statistics over both"),
        pytest.param("2-1-eval", "1-1-eval", id="two processes"),
        pytest.param("1-2-eval", "1-1-eval", id="two micro-batches"),
        pytest.param("2-2-eval", "1-4-eval", id="two processes with two micro-batches each"),
        pytest.param("2-2-eval", "1-1-eval", id="image by image"),
    ],
)
def test_the_split_changes_nothing(steps, split, whole):
    # The losses are float32 by design, and how they are rounded may depend on how many images stand side by side.
    largest = 1e-7 if (split, whole) == ("2-2-eval", "1-1-eval") else 1e-9
    for what in ("gradients", "weights"):
        assert distance(steps[split][what], steps[whole][what]) < largest, what
    for name, loss in steps[whole]["losses"].items():
        assert steps[split]["losses"][name].item() == pytest.approx(loss.item(), rel=1e-5), name
    assert steps[whole]["losses"]["train/grad_norm"] > 0.5  # so that the gradient was clipped


@pytest.mark.parametrize(
    ("split", "whole"), [("2-1-train", "1-1-train"), ("2-1-eval", "1-1-eval"), ("1-2-eval", "1-1-eval")]
)
def test_in_float32_gradients_differ_by_rounding(steps, split, whole, record_property):
    """In two of three networks at least: in one, rounding may decide a tie of points or prototypes the other way."""
    names = [(f"{split}-float32-{seed}", f"{whole}-float32-{seed}") for seed in SEEDS]
    differences = [distance(steps[a]["gradients"], steps[b]["gradients"]) for a, b in names]
    record_property("differences", differences)  # shown by --junitxml
    assert sorted(differences)[1] < 1e-5


def test_a_comparison_that_has_to_fail(steps):
    """Micro-batches are normalised by their own statistics; that is what the others could have missed."""
    assert distance(steps["1-2-train"]["gradients"], steps["1-1-train"]["gradients"]) > 0.01
