"""scripts/ablation_report.py: what it writes, and its exit codes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from tests.ablation.conftest import write_run

SCRIPT = Path(__file__).parents[2] / "scripts" / "ablation_report.py"
TINY = ("--size", "64x96", "--rounds", "2", "--device", "cpu")


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("ablation_report_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module.main
    torch.set_num_threads(threads)


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "multirun" / "0", "decoder_layers=1", values=[1, 2, 3, 4])
    write_run(tmp_path / "multirun" / "1", "decoder_layers=2", values=[2, 3], steps=310)
    return tmp_path / "multirun"


def test_a_report_is_written_and_measurements_are_reused(main, runs, tmp_path, capsys):
    out = tmp_path / "report"
    assert main([str(runs), "--output", str(out), *TINY]) == 0
    names = {path.name for path in out.iterdir()}
    figures = {"quality.png", "depth.png", "curves_depth.png"}
    assert names == {"report.html", "report.md", "report.csv", "measurements.json"} | figures
    printed = capsys.readouterr()
    assert printed.out.startswith("2 runs, 2 variants: quality.png")
    assert "round 2 of 2" in printed.err
    page = (out / "report.html").read_text()
    assert "310 of 600" in page
    assert "2 runs, 2 variants. Made by python scripts/ablation_report.py" in page
    before = (out / "measurements.json").read_text()
    assert main([str(runs), "--output", str(out), *TINY, "--reuse"]) == 0
    assert (out / "measurements.json").read_text() == before
    assert "round" not in capsys.readouterr().err


def test_without_latency_operations_are_counted_all_the_same(main, runs, tmp_path):
    assert main([str(runs), "--output", str(tmp_path), *TINY, "--no-latency"]) == 0
    networks = json.loads((tmp_path / "measurements.json").read_text())["networks"].values()
    assert all(network["gmacs"] > 0 and network["latency_ms"] is None for network in networks)
    assert "latency, ms" not in (tmp_path / "report.md").read_text()


def test_a_broken_run_is_said_and_the_others_are_reported(main, runs, tmp_path, capsys):
    (runs / "1" / "csv" / "metrics.csv").unlink()
    assert main([str(runs), "--output", str(tmp_path / "report"), *TINY, "--no-latency"]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert str(runs / "1") in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{empty}"], "error: there is no training run in"),
        (["{empty}/nowhere"], "nowhere is no folder"),
        (["{runs}", "--size", "64"], "error: --size 64: give height x width"),
        (["{runs}", "--rounds", "0"], "error: --rounds 0: give 1 or more"),
    ],
)
def test_mistakes_end_in_one_line_and_write_nothing(main, runs, tmp_path, capsys, arguments, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    out = tmp_path / "report"
    assert main([*(a.format(empty=empty, runs=runs) for a in arguments), "--output", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_an_output_that_cannot_be_written(main, runs, capsys):
    assert main([str(runs), "--output", str(SCRIPT / "x"), *TINY, "--no-latency"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write")
