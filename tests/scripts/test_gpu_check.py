"""Parts run one by one within a budget, and none keeps the others from running; on a CPU they are small."""

import argparse
import json
import sys
import time

import pytest
import torch

from scripts import gpu_check
from scripts.gpu_check import Part
from tests.jobs import compose


def part(name, code, seconds=60.0, **more):
    return Part(name, [sys.executable, "-c", code], seconds, **more)


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Runs parts without a GPU; returns the exit code and the report's parts."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def check(parts, *arguments):
        monkeypatch.setattr(gpu_check, "parts", lambda options, cuda: iter(parts))
        code = gpu_check.main(["--output", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "gpu_check.json").read_text())["parts"]

    return check


HANGS = """
import subprocess, sys, time
print('{"a": 1}', flush=True)
subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])  # which holds the pipe as well
"""


def test_a_failing_part_and_one_that_hangs_do_not_stop_the_others(check, tmp_path, capsys):
    parts = [
        part("kernels", "raise SystemExit(3)"),
        part("inference", HANGS, seconds=2),
        part("step", """print('{"ms": 1.5, "loss": 2}'); print('"left out"'); print('from a library')"""),
        part("train", "print('no results')", read=lambda text: iter([f"failed: {text.strip()}"])),
    ]
    began = time.monotonic()
    code, found = check(parts)
    assert code == 1
    assert time.monotonic() - began < 30
    statuses = {name: one["status"] for name, one in found.items()}
    assert statuses == {"kernels": "failed (3)", "inference": "took too long", "step": "passed", "train": "failed (0)"}
    assert found["inference"]["lines"] == [{"a": 1}]
    assert found["step"]["lines"] == [{"ms": 1.5, "loss": 2}, "left out"]
    report = (tmp_path / "gpu_check.md").read_text()
    assert "## kernels: failed (3)" in report
    assert "\n| ms | loss |\n| --- | --: |\n| 1.5 | 2 |\n\n- left out\n" in report
    assert "- failed: no results" in report
    assert "from a library" in (tmp_path / "step.log").read_text()
    assert check(parts, "--only", "step")[0] == 0


def test_what_does_not_fit_the_budget_is_skipped(check, capsys):
    parts = [
        part("tests", "raise SystemExit(1)", needs_gpu=True),
        part("train", "raise SystemExit(1)", seconds=31),
        part("step", "print('{}')", seconds=20),
    ]
    code, found = check(parts, "--minutes", "0.5")
    assert code == 0
    assert found["tests"]["status"] == "skipped: it needs a GPU"
    assert found["train"]["status"].startswith("skipped: it may take 31 s, of which ")
    assert found["step"]["status"] == "passed"
    assert "tests: skipped: it needs a GPU" in capsys.readouterr().out


def test_a_row_is_in_the_report_before_its_part_ends(check, tmp_path):
    code = f"""
import pathlib, time
print('{{"first": 1}}', flush=True)
for _ in range(200):
    time.sleep(0.1)
    if '"first"' in pathlib.Path({str(tmp_path / "gpu_check.json")!r}).read_text():
        raise SystemExit(0)
raise SystemExit(1)
"""
    assert check([part("step", code)])[1]["step"]["status"] == "passed"


@pytest.mark.parametrize("small", [True, False])
def test_the_parts_and_their_trainings(tmp_path, small):
    options = argparse.Namespace(output=tmp_path, quick=small, camvid=tmp_path)
    parts = {part.name: part for part in gpu_check.parts(options, cuda=True)}
    assert tuple(parts) == gpu_check.NAMES
    assert sum(part.seconds for name, part in parts.items() if name != "camvid") <= 8 * 60
    assert ("--small" in parts["step"].command) == small
    drawn, camvid = (compose("train", *parts[name].command[2:]) for name in ("train", "camvid"))
    assert drawn.trainer.max_time == "00:00:01:00"
    assert camvid.trainer.max_time == "00:00:02:00"
    assert camvid.trainer.precision == "bf16-mixed"
    if not small:
        assert drawn.recipe == compose("train", "recipe.val_interval=600").recipe
        assert camvid.recipe == compose("train", "dataset=camvid", "recipe.val_interval=100000").recipe


@pytest.mark.parametrize(("pq", "failures"), [(60.0, 0), (59.9, 1), (float("nan"), 1)])
def test_a_training_is_read_and_held_against_its_bar(tmp_path, pq, failures):
    (tmp_path / "csv").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps({"val/PQ": pq, "val/mIoU": 70.123, "step": 480}))
    lines = ["train/gpu_memory_gib,train/images_per_second,val/PQ", "1.5,100,", "2.5,300,", ",,60", "2.5,200,"]
    (tmp_path / "csv" / "metrics.csv").write_text("\n".join(lines))
    profile = "|  [_TrainingEpochLoop].train_dataloader_next  |  0.0025   |  480  |  1.2  |  3.0  |"
    (tmp_path / "fit-profile.txt").write_text(profile)
    row, *failed = gpu_check.read_training(tmp_path, ("PQ", 60.0))
    expected = {"mIoU": 70.12, "steps": 480, "images/s": 200, "data wait, ms a step": 2.5, "GPU memory, GiB": 2.5}
    assert {name: value for name, value in row.items() if name != "PQ"} == expected
    assert len(failed) == failures
    assert all(line.startswith("failed: PQ") for line in failed)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--camvid", "nowhere"], "is no folder"),
        (["--only", "camvid"], "needs --camvid"),
        (["--only", "speed"], "invalid choice"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, hint):
    with pytest.raises(SystemExit) as stop:
        gpu_check.main(["--output", str(tmp_path / "new"), *arguments])
    assert stop.value.code == 2
    assert hint in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_training_runs_in_a_small_size_without_a_gpu(tmp_path):
    assert gpu_check.main(["--output", str(tmp_path), "--quick", "--only", "train", "compile"]) == 0
    report = (tmp_path / "gpu_check.md").read_text()
    assert "| PQ | mIoU | steps |" in report
    assert torch.cuda.is_available() or "## compile: skipped: it needs a GPU" in report
