"""scripts/convert_checkpoint.py: what it prints and writes, and its exit codes."""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.checkpoint_files import detectron2_pickle, random_backbone, write_pickle

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_prints_the_table_and_writes_what_weights_reads(main, tmp_path, capsys):
    backbone = random_backbone("resnet50")
    path = write_pickle(tmp_path / "R-50.pkl", detectron2_pickle(backbone))
    assert main([str(path), f"{tmp_path}/out.pth"]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines()]
    assert ["loaded", "265", "backbone", "(265)"] in rows
    assert ["unexpected,", "not", "used", "2", "stem.fc.weight,", "stem.fc.bias"] in rows
    assert f"wrote {tmp_path}/out.pth" in printed
    written = torch.load(tmp_path / "out.pth")
    state = {key: value for key, value in backbone.state_dict().items() if "batches" not in key}
    assert written.keys() == {f"backbone.{key}" for key in state}
    assert all(torch.equal(written[f"backbone.{key}"], value) for key, value in state.items())


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
        (path, ["--int8"], "--int8 is for checkpoints"),
    ):
        assert main([str(source), f"{tmp_path}/out.pth", *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert not (tmp_path / "out.pth").exists()
    assert main([str(path), f"{SCRIPT}/out.pth"]) == 2
    assert "cannot write" in capsys.readouterr().err
