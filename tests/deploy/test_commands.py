"""Exported files from the command line: evaluated and used like checkpoints, and one line for whatever is wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from pem_lightning import Predictor
from pem_lightning.checkpoints import convert_weights
from pem_lightning.deploy.sessions import open_session
from pem_lightning.preprocess import normalize
from pem_lightning.types import UserError
from tests.jobs import TINIEST, call, unchecked_shapes

pytestmark = pytest.mark.slow

QUIET = ("trainer=cpu", "callbacks.panels=null", "callbacks.worst=null", "callbacks.confusion=null")


def metrics_of(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


@pytest.fixture(scope="module")
def evaluated(tiny_exports, work):
    """The checkpoint's evaluation."""
    arguments = (*QUIET, "hydra.run.dir=ckpt", "save_predictions=saved_ckpt")
    assert call("evaluate", f"checkpoint={tiny_exports.checkpoint}", *arguments) == 0
    return metrics_of("ckpt")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_file_itself_is_evaluated(tiny_exports, evaluated, name):
    """In float32 with the checkpoint's numbers and maps."""
    arguments = (*QUIET, f"hydra.run.dir={name}", f"save_predictions=saved_{name}")
    assert call("evaluate", f"checkpoint={getattr(tiny_exports, name)}", *arguments) == 0
    metrics = metrics_of(name)
    assert metrics["step"] == 7
    assert metrics["val/PQ"] == evaluated["val/PQ"]
    maps = sorted(Path("saved_ckpt/panoptic").glob("*.png"))
    assert len(maps) == 3
    for path in maps:
        assert np.array_equal(Image.open(path), Image.open(f"saved_{name}/panoptic/{path.name}"))


def test_other_tasks_views_and_tiles(tiny_exports, work):
    checkpoint = f"checkpoint={tiny_exports.onnx}"
    views = ("task=semantic", "inference.flip=true", "inference.scales=[0.75,1.0]", "inference.tile=[64,64]")
    assert call("evaluate", checkpoint, *QUIET, *views, "inference.overlap=16", "hydra.run.dir=views") == 0
    assert "val/mIoU" in metrics_of("views")
    photo = work / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 70, 3), np.uint8)).save(photo)
    for source in (checkpoint, f"checkpoint={tiny_exports.checkpoint}"):
        assert call("predict", source, f"input={photo}", f"output={source[-4:]}", "task=panoptic", "save=all") == 0
    assert np.array_equal(*(Image.open(next(Path(f).rglob("*_overlay.png"))) for f in ("onnx", "ckpt")))


@pytest.mark.parametrize(("format", "name"), [("onnx", "int8.onnx"), ("openvino", "int8.xml")])
def test_int8_is_measured_before_and_after(tiny_exports, evaluated, format, name, capsys):
    arguments = (f"checkpoint={tiny_exports.checkpoint}", "precision=int8", f"format={format}", f"output={name}")
    with unchecked_shapes():
        assert call("export", *arguments, *QUIET[:1], "size=[64,128]", "calibration=3", "hydra.run.dir=int8") == 0
    metadata = open_session(name).metadata
    assert metadata.precision == "int8"
    before, after = evaluated["val/PQ"], metadata.quality["val/PQ"]
    assert abs(after - before) < 5
    assert f"{before:.2f}" in (said := capsys.readouterr().out)
    assert f"{after:.2f}" in said


def test_fewer_layers_and_queries_go_into_the_file(tiny_exports, evaluated):
    """Evaluation, prediction and export agree on it, and the file says so without doing it twice."""
    kept, checkpoint = [*range(3, 15)], f"checkpoint={tiny_exports.checkpoint}"
    early = ("inference.decoder_layers=1", f"inference.queries={kept}")
    assert call("evaluate", checkpoint, *QUIET, *early, "hydra.run.dir=early") == 0
    with unchecked_shapes():
        assert call("export", checkpoint, *early, "deform=gather", "output=early.onnx", "hydra.run.dir=export") == 0
    assert call("evaluate", "checkpoint=early.onnx", *QUIET, "hydra.run.dir=early_onnx") == 0
    found = metrics_of("early")["val/mIoU"]
    assert metrics_of("early_onnx")["val/mIoU"] == pytest.approx(found, abs=0.01)
    assert abs(found - evaluated["val/mIoU"]) > 0.02
    assert open_session("early.onnx").metadata.config["inference"]["decoder_layers"] == 1
    noise = torch.randint(256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = normalize(noise)[None]
    file = Predictor("early.onnx", device="cpu").model(images)
    fast = Predictor(tiny_exports.checkpoint, device="cpu", decoder_layers=1, queries=kept).model(images)
    assert (file.mask_logits - fast.mask_logits).abs().max() < 1e-3 * fast.mask_logits.abs().max()


def damaged(folder, exports):
    """Files with one thing wrong each, by name."""
    bin_file = exports.openvino.with_suffix(".bin")
    xml, weights, half = exports.openvino.read_bytes(), bin_file.read_bytes(), exports.onnx.read_bytes()
    foreign = onnx.load(exports.onnx)
    del foreign.metadata_props[:]
    files = {
        "half.onnx": half[: len(half) // 2],
        "text.onnx": b"hello",
        "empty.onnx": b"",
        "foreign.onnx": foreign.SerializeToString(),
        "alone.xml": xml,
        "short.xml": xml,
        "short.bin": weights[: len(weights) // 2],
        "half.xml": xml[: len(xml) // 2],
        "half.bin": weights,
        "page.xml": b"<html/>",
        "page.bin": weights,
        "half.pt2": b"PK\x03\x04",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.fixture(scope="module")
def files(tiny_exports, work):
    damaged(work, tiny_exports)
    return {"ckpt": tiny_exports.checkpoint, "onnx": tiny_exports.onnx, "openvino": tiny_exports.openvino}


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("evaluate", ["checkpoint=gone.onnx"], "gone.onnx does not exist"),
        ("evaluate", ["checkpoint=half.onnx"], "half.onnx cannot be opened"),
        ("evaluate", ["checkpoint=text.onnx"], "it is damaged, or not of this format"),
        ("evaluate", ["checkpoint=empty.onnx"], "it is damaged, or not of this format"),
        ("evaluate", ["checkpoint=foreign.onnx"], "it was not written by export.py"),
        ("evaluate", ["checkpoint=alone.xml"], "alone.bin is missing"),
        ("evaluate", ["checkpoint=short.xml"], "short.xml cannot be opened"),
        ("evaluate", ["checkpoint=half.xml"], "half.xml cannot be opened"),
        ("evaluate", ["checkpoint=page.xml"], "page.xml is damaged or is no model of OpenVINO"),
        ("evaluate", ["checkpoint=half.pt2"], "half.pt2 is damaged"),
        ("predict", ["checkpoint=half.onnx", "input=0"], "half.onnx cannot be opened"),
        ("evaluate", ["checkpoint={onnx}", "backbone=stdc2"], "backbone= cannot change"),
        ("evaluate", ["checkpoint={onnx}", "ema=false"], "ema= cannot change"),
        ("predict", ["checkpoint={onnx}", "input=0", "inference.decoder_layers=1"], "decoder_layers= cannot change"),
        ("predict", ["checkpoint={ckpt}", "input=0", "inference.decoder_layers=3"], "choose 0 to 2, the layers"),
        ("export", ["checkpoint={ckpt}", "inference.decoder_layers=two"], "decoder_layers=two: choose 0 to 2"),
        ("evaluate", ["checkpoint={onnx}", "inference.queries=[0]"], "inference.queries= cannot change"),
        ("predict", ["checkpoint={ckpt}", "input=0", "inference.queries=[20]"], "numbers from 0 to 19"),
        ("evaluate", ["checkpoint={onnx}", "trainer=cpu", "inference.precision=bfloat16"], "is for OpenVINO's .xml"),
        ("predict", ["checkpoint={onnx}", "input=0", "inference.compile=default"], "has a runtime of its own"),
        ("predict", ["checkpoint={openvino}", "input=0", "device=cuda"], "device=c"),
        ("train", [*TINIEST, "weights={onnx}"], "give the checkpoint that it was made from"),
        ("train", ["resume={onnx}"], "give the checkpoint that it was made from"),
        ("export", ["checkpoint={onnx}"], "give the checkpoint that it was made from"),
        ("export", [], "say checkpoint="),
        ("export", ["checkpoint={ckpt}", "format=onx"], "choose onnx, openvino"),
        ("export", ["checkpoint={ckpt}", "precision=int4"], "choose float32, float16 or int8"),
        ("export", ["checkpoint={ckpt}", "precision=int8", "format=torch_export"], "not for torch_export"),
        ("export", ["checkpoint={ckpt}", "precision=int8", "calibration=0"], "calibration=0: give a number"),
        ("export", ["checkpoint={ckpt}", "deform=magic"], "deform=magic: choose"),
        ("export", ["checkpoint={ckpt}", "size=512"], "size=512: give height and width"),
        ("export", ["checkpoint={ckpt}", "size=[0,10]"], "give height and width"),
        ("export", ["checkpoint={ckpt}", "results=true"], "choose false, panoptic or semantic"),
        ("export", ["checkpoint={ckpt}", "evaluate=maybe"], "choose auto, true or false"),
        ("export", ["checkpoint={ckpt}", "format=onnx", "output=a.xml"], "does not end in .onnx"),
        ("export", ["checkpoint={ckpt}", "output=a.ckpt"], "does not end in .onnx"),
        ("export", ["checkpoint={ckpt}", "formt=onnx"], "did you mean format?"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(files, job, arguments, message, capsys):
    capsys.readouterr()
    for name, path in files.items():
        arguments = [argument.replace(f"{{{name}}}", str(path)) for argument in arguments]
    assert call(job, *arguments, "hydra.run.dir=mistakes") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_runtime_that_is_not_installed(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert call("evaluate", f"checkpoint={files['onnx']}", "trainer=cpu", "hydra.run.dir=mistakes") == 2
    assert "tiny.onnx needs onnxruntime: pip install onnxruntime" in capsys.readouterr().err


def test_an_exported_file_is_not_converted(files, tmp_path):
    with pytest.raises(UserError, match="give the checkpoint that it was made from"):
        convert_weights(files["onnx"], tmp_path / "slim.pth")
