"""What a GPU's parts count and refuse; `tests/test_gpu.py` runs on one."""

import argparse
import json

import pytest
import torch

from scripts.benchmark import gpu, kernels
from scripts.benchmark.gpu import CountBytes
from scripts.benchmark.reference.network import deform_conv


def test_bytes_are_counted_once_and_views_are_free():
    a = torch.zeros(10, 10)
    with CountBytes() as counter:
        a.view(100)[3:50].view(47, 1)
    assert counter.total == 0
    with CountBytes() as counter:
        a + torch.zeros(1).expand(10, 10)
    assert counter.total == 400 + 4 + 400


@pytest.mark.parametrize(("lines", "code"), [([{"ms": 1}, "left out: this"], 0), (["failed: that", {"ms": 1}], 1)])
def test_lines_are_printed_and_failures_show_in_the_exit_code(monkeypatch, capsys, lines, code):
    monkeypatch.setitem(gpu.PARTS, "step", lambda options: iter(lines))
    assert gpu.main(["step", "--small"]) == code
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


@pytest.mark.parametrize("deviations", [(2e-4, 0.0), (0.0, 2e-2), (float("nan"), 0.0)])
def test_a_kernel_that_is_off_fails(monkeypatch, deviations):
    monkeypatch.setattr(kernels, "measure_all", lambda options: iter([("convolution", "odd", *deviations, "1", "2")]))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    _, failed = gpu.check_kernels(argparse.Namespace(small=True, device="cpu"))
    assert failed.startswith("failed: convolution, odd")


def test_deviations_of_kernels_are_relative():
    options = argparse.Namespace(batch=1, device="cpu")
    problem = next(iter(kernels.conv_problems([(4, 6)], options)))
    exact = kernels.in_float64(problem, deform_conv)
    assert max(kernels.deviations(problem, deform_conv, exact)) < 1e-5
    deviation, of_points = kernels.deviations(problem, lambda *given: 1.001 * deform_conv(*given), exact)
    assert deviation == pytest.approx(2e-3, rel=0.01)  # gradients of a square
    assert of_points == pytest.approx(2e-3, rel=0.01)


@pytest.mark.slow
def test_a_step_by_precision_on_a_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "PRECISIONS", ("float32", "float32"))  # others take long on some CPUs
    row, left_out = gpu.measure_step(argparse.Namespace(small=True, device="cpu"))
    assert row["off float32"] == 0
    assert row["ms"] > row["forward"] > 0
    assert left_out.startswith("left out")
