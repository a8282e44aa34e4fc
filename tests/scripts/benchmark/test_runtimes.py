"""Runtimes are timed in processes of their own; one that dies is a line, and the others go on."""

import argparse
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.types import UserError
from scripts.benchmark import common, runtimes
from scripts.benchmark.__main__ import main
from scripts.benchmark.runtimes import ONNX, OPENVINO, PYTORCH, Measurement, Runner
from tests.deploy.tiny import tiny_checkpoint
from tests.jobs import unchecked_shapes

ROOT = Path(__file__).parents[3]
OPTIONS = argparse.Namespace(size=(64, 96), rounds=2, warmup=1, backbones=["stdc1"], baselines=["segformer_b0"])
FAKE = """
import os, sys
file, precision, size, threads, runs = sys.argv[1:]
assert (precision, size, runs) == ("float32", "64x96", "2")
if file.endswith("dies"):
    os.kill(os.getpid(), 9)
if file.endswith("fails"):
    sys.exit("no such operator")
print("ready\\n0.25 100.5")
"""


def test_a_process_that_dies_is_a_line_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    (program := tmp_path / "runner.py").write_text(FAKE)
    monkeypatch.setattr(runtimes, "RUNNER", program)
    files = {Runner("stdc1", ONNX, "float32", file): tmp_path / file for file in ("works", "dies", "fails")}
    failures = {}
    measured = runtimes.measure_in_turns(files, OPTIONS, failures)
    assert [(runner.file, len(found)) for runner, found in measured.items()] == [("works", 2)]
    assert all(m.seconds == 0.25 and m.memory == 100.5 and m.start > 0 for m in measured[next(iter(files))])
    assert {runner.file: error for runner, error in failures.items()} == {
        "dies": "its process has failed (SIGKILL): no message",
        "fails": "its process has failed (exit code 1): no such operator",
    }
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors[0] == "error: stdc1 ONNX Runtime float32: its process has failed (SIGKILL): no message"
    assert len(errors) == 2


def test_the_report_has_a_row_for_what_works_and_a_line_for_what_does_not(monkeypatch, capsys):
    def write(job, network, size, folder):
        if network == "segformer_b0":
            raise UserError("no such operator")
        for file in ("model.ckpt", "model.xml", "model.bin"):
            (folder / file).write_bytes(bytes(10**6))
        return ""

    def measure(file, precision, options):
        return Measurement(0.4 if file.suffix == ".ckpt" else 0.3, 1.5, 200.0)

    monkeypatch.setattr(runtimes.common, "in_fresh_process", write)
    monkeypatch.setattr(runtimes, "measure", measure)
    monkeypatch.setattr(runtimes, "processor_flags", set)
    monkeypatch.setattr(runtimes, "install_size", lambda packages: 300 if "openvino" in packages else 1900)
    monkeypatch.setattr(runtimes.importlib.metadata, "version", lambda package: "1.0")
    assert main(["runtimes", "--backbones", "stdc1", "--baselines", "segformer_b0", "--rounds", "2"]) == 0
    report = capsys.readouterr().out
    assert "| stdc1 PyTorch float32 | 400 (400 to 400) | 1 (1 to 1) | 200 | 1.5 | 1.0 | 1900 |" in report
    assert "| stdc1 OpenVINO float32 | 300 (300 to 300) | 0.75 (0.75 to 0.75) | 200 | 1.5 | 2.0 | 300 |" in report
    assert "\nbfloat16 is left out: " in report
    assert "\nsegformer_b0 ONNX Runtime float32 is left out: no such operator.\n" in report
    assert "\nstdc1 OpenVINO int8 is left out: was not exported.\n" in report


def test_a_missing_runtime_is_named_with_the_cure(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    assert main(["runtimes"]) == 2
    assert capsys.readouterr().err == "error: runtimes needs onnxruntime: pip install -r requirements-export.txt\n"


def test_precisions_are_those_of_the_processor():
    everything, notes = runtimes.list_runners(OPTIONS, {"avx512_bf16", "avx512_vnni"})
    assert not notes
    assert [runner[1:3] for runner in everything if runner.network == "stdc1"] == [
        (PYTORCH, "float32"),
        (PYTORCH, "bfloat16"),
        (ONNX, "float32"),
        (OPENVINO, "float32"),
        (OPENVINO, "bfloat16"),
        (OPENVINO, "int8"),
    ]
    few, notes = runtimes.list_runners(OPTIONS, {"avx2"})
    assert {runner.precision for runner in few} == {"float32", "int8"}
    assert len(notes) == 2


def test_packages_count_with_what_they_need(tmp_path, monkeypatch):
    def install(name, size, requires=""):
        (folder := tmp_path / f"{name}-1.0.dist-info").mkdir()
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}")
        (folder / "RECORD").write_text(f"{name}.bin,,\n{name}-missing.bin,,\n")

    needs = ("second-part>=1", "other; python_version < '3'", "extra-part; extra == 'all'", "not-installed")
    install("first", 2_000_000, "".join(f"Requires-Dist: {line}\n" for line in needs))
    install("second_part", 1_000_000, "Requires-Dist: first\n")
    install("extra_part", 5_000_000)
    install("other", 5_000_000)
    monkeypatch.syspath_prepend(tmp_path)
    assert runtimes.install_size(["first[all]>=1"]) == 3
    assert {"torch==2.13.0"} & {line.replace(" ", "") for line in runtimes.requirements()}


def test_an_exported_file_runs_without_pytorch(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    make = onnx.helper
    image, result = (make.make_tensor_value_info(x, onnx.TensorProto.UINT8, (1, 32, 48, 3)) for x in ("images", "y"))
    graph = make.make_graph([make.make_node("Identity", ["images"], ["y"])], "copy", [image], [result])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    program = f"""
import sys
from pathlib import Path
from scripts.benchmark.runner import draw_image, open_network
image = draw_image(32, 48)
assert (open_network(Path({str(tmp_path / "model.onnx")!r}), "float32", 1)(image)[0] == image).all()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def write_tiny_checkpoint(backbone, path):
    tiny = tiny_checkpoint(path.parent)
    ours = {"config": tiny.config, "overrides": [], "dataset_info": tiny.info.to_dict()}
    state = {f"network.{name}": value for name, value in tiny.network.items()}
    torch.save({"global_step": 7, "state_dict": state, CHECKPOINT_KEY: ours}, path)


@pytest.mark.slow
def test_runtimes_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(runtimes, "write_checkpoint", write_tiny_checkpoint)
    monkeypatch.setattr(common, "in_fresh_process", lambda job, *arguments: job(*arguments))  # where it is still tiny
    for library in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(library)
    try:
        with unchecked_shapes():
            assert main(["runtimes", "--backbones", "stdc1", "--size", "64x96", "--rounds", "1", "--warmup", "0"]) == 0
    finally:
        logging.disable(logging.NOTSET)  # what `export` does to its own process
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| stdc1")]
    names = ["PyTorch float32", "ONNX Runtime float32", "OpenVINO float32", "OpenVINO int8"]
    assert {f"| stdc1 {name}" for name in names} <= {row[0] for row in rows}
    assert all(0.1 < float(row[5]) < 10 for row in rows)


@pytest.mark.slow
def test_baselines_are_exported_as_they_are(tmp_path):
    for library in ("transformers", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(library)
    note = common.in_fresh_process(runtimes.export, "segformer_b0", (64, 96), tmp_path)
    assert note == "logits of [1, 19, 16, 24]"
    assert runtimes.file_size(tmp_path / "model.xml") == pytest.approx(15, abs=1)
