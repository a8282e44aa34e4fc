"""scripts/check_data.py: what it prints and writes, and its exit codes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.synthetic import generate_synthetic

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_data.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("check_data", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return generate_synthetic(tmp_path_factory.mktemp("check") / "drawn", train=8, val=2, height=64, width=128)


def test_script_on_broken_data(script, drawn, tmp_path, capsys):
    path = next((drawn / "leftImg8bit" / "val").rglob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    code = script.main(["dataset=cityscapes", f"dataset.root={drawn}", "--workers", "2", "--output", f"{tmp_path}"])
    path.write_bytes(whole)
    assert code == 1
    printed = capsys.readouterr().out
    assert f"problem: cannot read {path} (it is truncated): " in printed
    assert "traffic light" in printed
    assert f"report and galleries are in {tmp_path}" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert [problem for problem in report["val"]["problems"] if str(path) in problem]
    assert sum(k["pixels"] for k in report["train"]["classes"]) <= 8 * 64 * 128
    for split, rows in (("train", 2), ("val", 1)):
        width, height = Image.open(tmp_path / f"gallery_{split}.png").size
        assert width >= 400
        assert height >= 200 * rows


def test_script_on_the_users_own_data(script, tmp_path, capsys):
    for split in ("train", "val"):
        for folder, array in (("images", np.zeros((3, 4, 3), np.uint8)), ("labels", np.eye(3, 4, dtype=np.uint8))):
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / folder / split / "a.png")
    (tmp_path / "classes.yaml").write_text("[road, field]")
    arguments = ["dataset=semantic_folder", "--workers=0", "task=semantic", f"dataset.root={tmp_path}"]
    assert script.main([*arguments, f"--output={tmp_path}/out"]) == 0
    assert "2 images checked, no problem" in capsys.readouterr().out
    label = tmp_path / "labels" / "val" / "a.png"
    Image.fromarray(np.full((3, 4), 9, np.uint8)).save(label)
    assert script.main([*arguments, f"--output={tmp_path}/out"]) == 1
    assert f"problem: {label} has the value 9" in capsys.readouterr().out


def test_script_names_a_missing_split(script, drawn, tmp_path, capsys):
    arguments = ["dataset=cityscapes", f"dataset.root={tmp_path}/nowhere", "--workers=0", f"--output={tmp_path}/out"]
    assert script.main(arguments) == 1
    assert "leftImg8bit/val does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["dataset=atlantis"], ["dataset.rot=x"], ["--workers=0", "task=painting"]])
def test_script_refuses_wrong_usage_in_one_line(script, arguments, capsys):
    assert script.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no ")


@pytest.mark.slow
def test_script_as_a_program(tmp_path):
    """The drawn data set is sound; its files are made where they are missing."""
    arguments = ["dataset.root=drawn", "dataset.datamodule.num_train=24", "dataset.datamodule.num_val=2"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--workers=1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "26 images checked, no problem" in done.stdout
    assert (tmp_path / "data_check" / "gallery_train.png").is_file()
