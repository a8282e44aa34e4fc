"""scripts/evaluate_panoptic.py: what it prints and writes, and its exit codes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.panoptic_files import CATEGORIES, segment, write_panoptic

SCRIPT = Path(__file__).parents[2] / "scripts" / "evaluate_panoptic.py"
TABLE = """\
          |    PQ     SQ     RQ     N
--------------------------------------
All       |  76.9   77.7   98.9     6
Things    |  71.9   73.1   98.3     4
Stuff     |  86.8   86.8  100.0     2
"""


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("evaluate_panoptic", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def all3(reference):
    root = reference / "panoptic_quality" / "deeplab2"
    return str(root / "all3_gt.json"), str(root / "all3_pred.json")


def test_prints_panopticapis_table_and_every_class(main, all3, tmp_path, capsys):
    assert main([*all3, "--workers=2", f"--json={tmp_path}/new/numbers.json"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(TABLE)
    rows = [line.replace("│", " ").split() for line in printed.splitlines()]
    assert ["person", "thing", "70.2", "75.3", "93.3", "7", "0", "1"] in rows
    assert ["sky", "stuff", "99.1", "99.1", "100.0", "1", "0", "0"] in rows
    numbers = json.loads((tmp_path / "new" / "numbers.json").read_text())
    assert numbers["All"]["pq"] == pytest.approx(0.7685550311528847, abs=1e-9)
    assert numbers["per_class"]["1"]["tp"] == 7
    assert numbers["images"] == 3


def test_names_are_shown_as_they_are_and_notes_printed(main, tmp_path, capsys):
    image = {"a": ([[1, 2]], [segment(1, 1, area=1)])}
    categories = [{**CATEGORIES[1], "name": "[red]who[/]"}, CATEGORIES[0]]
    gt_json = write_panoptic(tmp_path / "gt.json", image, categories=categories)
    pred_json = write_panoptic(tmp_path / "pred.json", {"a": ([[1, 0]], [segment(1, 1)])})
    assert main([str(gt_json), str(pred_json), "--workers=0"]) == 0
    printed = capsys.readouterr().out
    assert "[red]who[/]" in printed
    assert "│ rug         │ stuff │     - │     - │     - │  0 │  0 │  0 │" in printed
    assert "Stuff     |     -      -      -     0" in printed
    assert f"note: {gt_json}: 1 image(s) have ids in the PNG of no counted segment; they are not void\n" in printed


def test_mistakes_end_in_one_line(main, all3, tmp_path, capsys):
    missing = [all3[0], f"{tmp_path}/none.json"]
    unwritable = [*all3, f"--json={SCRIPT}/x.json"]
    folder = [*all3, "--workers=2", f"--pred-folder={Path(all3[1]).parent}/team_pred"]
    for arguments, named in ((missing, "none.json"), (unwritable, "x.json"), (folder, "team_pred/bird.png")):
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert named in line


@pytest.mark.slow
def test_as_a_program(all3, tmp_path):
    command = [sys.executable, str(SCRIPT), all3[0], "none.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: none.json does not exist: give the prediction's JSON second\n"
