"""What scripts/check_data.py prints and writes, and its exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.synthetic import generate_synthetic
from pem_lightning.tools.check_data import main


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return generate_synthetic(tmp_path_factory.mktemp("check") / "drawn", train=5, val=2, height=32, width=64)


def test_broken_data(drawn, tmp_path, capsys):
    path = next((drawn / "leftImg8bit" / "val").rglob("*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    code = main(["dataset=cityscapes", f"dataset.root={drawn}", "--workers", "2", "--output", f"{tmp_path}"])
    path.write_bytes(whole)
    assert code == 1
    printed = capsys.readouterr().out
    assert f"problem: cannot read {path} (it is truncated): " in printed
    assert "traffic light" in printed
    assert f"report and galleries are in {tmp_path}" in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert [problem for problem in report["val"]["problems"] if str(path) in problem]
    assert sum(k["pixels"] for k in report["train"]["classes"]) <= 5 * 32 * 64
    for split, rows in (("train", 2), ("val", 1)):
        width, height = Image.open(tmp_path / f"gallery_{split}.png").size
        assert width >= 400
        assert height >= 200 * rows


def test_the_users_own_data(tmp_path, capsys):
    for split in ("train", "val"):
        for folder, array in (("images", np.zeros((3, 4, 3), np.uint8)), ("labels", np.eye(3, 4, dtype=np.uint8))):
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / folder / split / "a.png")
    (tmp_path / "classes.yaml").write_text("[road, field]")
    arguments = ["dataset=semantic_folder", "--workers=0", f"dataset.root={tmp_path}"]
    assert main([*arguments, f"--output={tmp_path}/out"]) == 0
    assert "2 images checked, no problem" in capsys.readouterr().out
    label = tmp_path / "labels" / "val" / "a.png"
    Image.fromarray(np.full((3, 4), 9, np.uint8)).save(label)
    assert main([*arguments, f"--output={tmp_path}/out"]) == 1
    assert f"problem: {label} has the value 9" in capsys.readouterr().out


def test_drawn_data_is_made_where_it_is_missing(tmp_path, capsys):
    arguments = [f"dataset.root={tmp_path}/drawn", "--workers=0", f"--output={tmp_path}/out"]
    size = ["num_train=2", "num_val=1", "height=32", "width=64"]
    assert main([*arguments, *(f"dataset.datamodule.{key}" for key in size)]) in (0, 1)  # so few may lack a class
    assert "3 images checked" in capsys.readouterr().out
    assert (tmp_path / "out" / "gallery_train.png").is_file()


def test_a_missing_split_is_named(tmp_path, capsys):
    assert main(["dataset=cityscapes", f"dataset.root={tmp_path}/none", "--workers=0", f"--output={tmp_path}"]) == 1
    assert "leftImg8bit/val does not exist" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["dataset=atlantis"], ["dataset.rot=x"], ["--workers=0", "task=painting"]])
def test_wrong_usage_is_refused_in_one_line(arguments, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: there is no ")
