"""Parts run one by one, and none keeps the others from running; on a CPU they are small."""

import json
import sys

import pytest

from scripts import gpu_check
from scripts.gpu_check import Part


def program(code, seconds=60.0):
    return [sys.executable, "-c", code], seconds


def test_a_failing_part_and_one_that_hangs_do_not_stop_the_others(monkeypatch, tmp_path):
    parts = [
        Part("tests", *program("print('nothing to test'); raise SystemExit(5)")),
        Part("kernels", *program("raise SystemExit(3)")),
        Part("inference", *program("import time; print('begun', flush=True); time.sleep(60)", seconds=2)),
        Part("training", *program("print('| a |'); print('| --: |')")),
    ]
    monkeypatch.setattr(gpu_check, "parts", lambda cuda, output: iter(parts))
    assert gpu_check.main(["--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    statuses = {name: part["status"] for name, part in found.items()}
    expected = {"tests": "passed", "kernels": "failed (3)", "inference": "took too long", "training": "passed"}
    assert statuses == expected
    assert "begun" in (tmp_path / "inference.log").read_text()
    report = (tmp_path / "gpu_check.md").read_text()
    assert "## kernels: failed (3)" in report
    assert "\n| a |\n| --: |\n" in report
    assert gpu_check.main(["--output", str(tmp_path), "--only", "training"]) == 0


@pytest.mark.slow
def test_kernels_run_in_a_small_size_without_a_gpu(tmp_path):
    assert gpu_check.main(["--output", str(tmp_path), "--only", "kernels"]) == 0
    assert "| convolution 2x4 | torch |" in (tmp_path / "gpu_check.md").read_text()
