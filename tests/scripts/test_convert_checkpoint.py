"""scripts/convert_checkpoint.py: what it prints and writes, and its exit codes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.checkpoints import load_weights
from tests.checkpoint_files import detectron2_pickle, random_backbone, write_pickle

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_prints_the_table_and_writes_what_weights_reads(main, tmp_path, capsys):
    path = write_pickle(tmp_path / "R-50.pkl", detectron2_pickle(random_backbone("resnet50")))
    assert main([str(path), f"{tmp_path}/out.pth"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["loaded", "265", "backbone", "(265)"] in rows
    assert ["unexpected,", "not", "used", "2", "stem.fc.weight,", "stem.fc.bias"] in rows
    assert f"wrote {tmp_path}/out.pth" in printed
    report = load_weights(build_pem("resnet50", num_classes=3, num_layers=1), tmp_path / "out.pth")
    assert len(report.loaded) == 265


def test_mistakes_end_in_one_line_and_write_nothing(main, tmp_path, capsys):
    path = tmp_path / "resnet18.pth"
    torch.save(random_backbone("resnet18").state_dict(), path)
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"broken")
    for source, more, message in (
        (path, ["--backbone=resnet34"], "does not cover the backbone"),
        (path, ["--backbone=resnet"], "unknown backbone"),
        (tmp_path / "none.pth", [], "none.pth does not exist"),
        (tmp_path / "other.pth", [], "of no known kind"),
        (tmp_path / "broken.pth", [], "damaged or no file of weights"),
    ):
        assert main([str(source), f"{tmp_path}/out.pth", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert not (tmp_path / "out.pth").exists()
    assert main([str(path), f"{SCRIPT}/out.pth"]) == 2
    assert "cannot write" in capsys.readouterr().err
