import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning import build_pem
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.data.cityscapes import CITYSCAPES

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark.py"
TINY = ("--size", "64x96", "--rounds", "2", "--warmup", "0", "--backbones", "stdc1", "--device", "cpu")
QUICK = ("--small-ceilings", "--no-memory")


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("benchmark_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module.main
    torch.set_num_threads(threads)


def read(folder):
    return json.loads((folder / "benchmark.json").read_text())


@pytest.mark.slow
def test_everything_is_measured_and_written(main, tmp_path, capsys):
    arguments = [*TINY, *QUICK, "--contestants", "straightforward,library,fast", "--threads", "1", "--kernels"]
    assert main([*arguments, "--precisions", "float32,bfloat16", "--output", str(tmp_path)]) == 0
    result, table = read(tmp_path), (tmp_path / "benchmark.md").read_text()
    rows = {row["name"]: row for row in result["contestants"]}
    assert list(rows) == ["stdc1 straightforward", "stdc1 library", "stdc1 fast float32", "stdc1 fast bfloat16"]
    for name, row in rows.items():
        spread = row["latency_ms"]
        assert 0 < spread["min"] <= spread["low"] <= spread["median"] <= spread["high"] <= spread["max"]
        assert len(row["rounds_ms"]) == 2
        assert list(row["stages_ms"]) == ["backbone", "pixel decoder", "transformer decoder", "post-processing"]
        assert list(row["tasks_ms"]) == ["semantic", "panoptic"]
        assert row["gmacs"] > 0
        assert row["roofline"]["gbytes"] > 0
        assert row["parameters_m"] == pytest.approx(16.96, abs=0.02)
        assert row["kept_queries"] > 0
        assert name in table
    quotients = np.divide(rows["stdc1 straightforward"]["rounds_ms"], rows["stdc1 fast float32"]["rounds_ms"])
    assert rows["stdc1 fast float32"]["speedup"]["median"] == pytest.approx(np.median(quotients))
    assert result["environment"]["command"].startswith("python scripts/benchmark.py --size 64x96")
    assert result["environment"]["threads"] == 1
    compared = [row["name"] for row in result["equality"]]
    assert compared == ["stdc1 straightforward without oneDNN", *list(rows)[1:]]
    for section in result["kernels"]:
        assert {row["kernel"] for row in section["rows"]} >= {"torch", "grid_sample"}
    kernels = ("Deformable convolution", "Multi-scale deformable attention")
    for section in ("Latency", "Stages", "Roofline", "Equality", *kernels):
        assert f"## {section}" in table
    assert "## Peak memory" not in table
    assert table in capsys.readouterr().out
    with Image.open(tmp_path / "benchmark.png") as picture:
        assert picture.width > 800


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own(main, tmp_path):
    assert main([*TINY, "--small-ceilings", "--contestants", "fast", "--output", str(tmp_path)]) == 0
    (row,) = read(tmp_path)["contestants"]
    memory = row["memory"]
    assert memory["increase"] == memory["peak"] - memory["base"]
    assert memory["increase"] > 4 * 16.9e6 / 2**20  # the weights at least
    assert "## Peak memory" in (tmp_path / "benchmark.md").read_text()


def test_the_child_process_measures_one_contestant(main, capsys):
    one = [*TINY, "--contestants", "library"]
    assert main([*one, "--measure-memory", "stdc1 library", "--threshold", "0.1"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("memory: ")
    assert set(json.loads(out.removeprefix("memory: "))) == {"base", "peak"}
    assert main([*one, "--measure-memory", "nobody"]) == 2
    assert "choose of stdc1 library" in capsys.readouterr().err


def test_peers_are_skipped_visibly_where_their_library_is_missing(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    arguments = [*TINY, *QUICK, "--no-equality", "--contestants", "library", "--peers", "segformer_b0,eomt_small"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(said) == 1  # one line for the library, not one per peer
    assert "requirements-bench.txt" in said[0]
    result = read(tmp_path)
    assert set(result["skipped"]) == {"segformer_b0 float32", "eomt_small float32"}
    assert [row["name"] for row in result["contestants"]] == ["stdc1 library"]
    assert "## Skipped" in (tmp_path / "benchmark.md").read_text()


def test_peers_take_part(main, tmp_path):
    pytest.importorskip("transformers", reason="peers need transformers (requirements-bench.txt)")
    arguments = [*TINY, *QUICK, "--contestants", "library", "--peers", "segformer_b0"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    _, row = read(tmp_path)["contestants"]
    assert row["kind"] == "segformer"
    assert row["tasks"] == ["semantic"]
    assert list(row["stages_ms"]) == ["network", "post-processing"]
    assert row["semantic_only_ms"]["median"] == pytest.approx(row["latency_ms"]["median"], rel=0.05)
    assert row["speedup"] is None


@pytest.mark.slow
def test_a_training_step_is_measured(main, tmp_path, capsys):
    arguments = ["--train", *TINY, "--segments", "3", "--num-points", "64", "--no-memory"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    result, table = read(tmp_path), (tmp_path / "benchmark.md").read_text()
    straight, ours = result["steps"]
    assert (straight["name"], ours["name"]) == ("stdc1 straightforward float32", "stdc1 ours float32")
    quotients = np.divide(ours["rounds_ms"], straight["rounds_ms"])
    assert ours["ratio"]["median"] == pytest.approx(np.median(quotients))
    assert result["settings"]["batch"] == 2
    assert [row["name"] for row in result["equality"]] == [f"{straight['name']} without oneDNN", ours["name"]]
    assert table in capsys.readouterr().out
    with Image.open(tmp_path / "benchmark.png") as picture:
        assert picture.width > 800


def test_the_child_process_measures_a_training_step(main, capsys):
    one = ["--train", *TINY, "--segments", "3", "--num-points", "64"]
    assert main([*one, "--measure-memory", "stdc1 ours float32"]) == 0
    assert set(json.loads(capsys.readouterr().out.removeprefix("memory: "))) == {"base", "peak"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "--kernels"], "error: --kernels does not go with --train"),
        (["--train", "--image", "x.png"], "error: --image does not go with --train"),
        (["--num-points", "9"], "error: --num-points goes with --train only"),
        (["--train", "--batch", "1"], "error: --batch 1: training needs 2 or more"),
        (["--train", "--contestants", ""], "error: nobody takes part"),
    ],
)
def test_mistakes_with_training_end_in_one_line(main, arguments, message, tmp_path, capsys):
    assert main([*arguments, "--size", "64x96", "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


def write_checkpoint(path, settings):
    network = build_pem(**settings, num_classes=CITYSCAPES.num_classes)
    config = {
        "network": {"_target_": "pem_lightning.build_pem", **settings},
        "task": {"inference": {"resize_first": True, "object_mask_threshold": 0.05, "overlap_threshold": 0.1}},
    }
    ours = {"config": config, "overrides": [], "dataset_info": CITYSCAPES.to_dict()}
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"global_step": 7, CHECKPOINT_KEY: ours, "state_dict": state}, path)


def test_a_checkpoint_and_a_photograph(main, tmp_path, capsys):
    write_checkpoint(tmp_path / "last.ckpt", {"backbone": "stdc1", "num_queries": 10, "num_layers": 2})
    Image.fromarray(np.full((40, 60, 3), 120, np.uint8)).save(tmp_path / "photo.png")
    given = ["--checkpoint", str(tmp_path / "last.ckpt"), "--image", str(tmp_path / "photo.png"), *QUICK]
    size = ["--size", "64x96", "--rounds", "1", "--output", str(tmp_path), "--device", "cpu"]
    assert main([*given, *size, "--contestants", "straightforward,fast"]) == 0
    for row in read(tmp_path)["contestants"]:
        assert row["weights"] == "last.ckpt, step 7 on cityscapes"
        assert row["threshold"] == 0.05
        assert row["kept_queries"] <= 10
    assert main([*given, *size, "--backbones", "stdc1"]) == 2
    assert "leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "1024"], "error: --size 1024: give height x width in pixels, such as 1024x2048"),
        (["--backbones", "resnet99"], "error: --backbones resnet99: choose of"),
        (["--checkpoint", "none.ckpt"], "error: checkpoint none.ckpt does not exist"),
        (["--image", "none.png"], "error: --image none.png does not exist: check the path"),
        (["--contestants", ""], "error: nobody takes part: --contestants and --peers are empty"),
    ],
)
def test_mistakes_end_in_one_line(main, arguments, message, tmp_path, capsys):
    size = [] if "--size" in arguments else ["--size", "64x96"]
    assert main([*size, *arguments, "--output", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []
