"""Files of every format: what is in them, that they run at other sizes, and that a wrong one is never written."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pem_lightning.deploy import check as checks
from pem_lightning.deploy import export as export_module
from pem_lightning.deploy.export import ExportOptions, export_checkpoint, load_trained
from pem_lightning.deploy.graph import ExportGraph
from pem_lightning.deploy.sessions import open_session
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.types import Predictions, UserError
from tests.deploy.tiny import tiny_checkpoint
from tests.jobs import unchecked_shapes

onnx = pytest.importorskip("onnx", reason="needs requirements-export.txt")
for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package, reason="needs requirements-export.txt")

BASIC = (
    "Add And ArgMax AveragePool BatchNormalization Cast Ceil Clip Concat Constant ConstantOfShape Conv ConvTranspose "
    "Cos Div Equal Expand Flatten Floor Gather GatherElements Gemm Greater GreaterOrEqual Identity LayerNormalization "
    "Less LessOrEqual MatMul Max Min Mod Mul Neg Not Pad Range Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape "
    "Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Transpose Unsqueeze Where"
)
"""Operators that every runtime of ONNX has."""


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch):
    monkeypatch.setattr(checks, "TIMED_SIZE", (64, 96))
    with unchecked_shapes():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def images(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def assert_runs(checkpoint, path, *shapes):
    """The file gives the logits of the checkpoint's network."""
    session, network = open_session(path), load_trained(checkpoint)
    for shape in shapes:
        wanted = checks.predict(network, images(*shape))
        class_logits, mask_logits = session.run(images(*shape))
        np.testing.assert_allclose(class_logits, wanted.class_logits, rtol=0, atol=1e-3)
        largest = wanted.mask_logits.abs().max().item()
        np.testing.assert_allclose(mask_logits, wanted.mask_logits, rtol=0, atol=1e-3 * largest)


@pytest.mark.slow
def test_onnx(checkpoint, tmp_path):
    report = export_checkpoint(checkpoint, tmp_path / "new" / "a.onnx", ExportOptions())
    path = tmp_path / "new" / "a.onnx"
    assert report.files == [path]
    assert [p.name for p in path.parent.iterdir()] == ["a.onnx"]
    assert report.megabytes == path.stat().st_size / 1e6
    assert report.deviation < 1e-4
    assert report.sign_flips < 1e-4
    assert report.milliseconds > 0
    assert report.pytorch_milliseconds > 0
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert {(o.domain, o.version) for o in model.opset_import} <= {("", 20)}
    assert not {node.op_type for node in model.graph.node} - set(BASIC.split())
    (given,) = model.graph.input
    assert given.name == "images"
    assert [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim] == ["batch", "height", "width", 3]
    assert [o.name for o in model.graph.output] == ["class_logits", "mask_logits"]
    content = path.read_bytes()
    assert b".py" not in content
    assert b"site-packages" not in content
    metadata = open_session(path).metadata
    assert metadata.to_json() == report.metadata.to_json()
    assert metadata.checks["deviation"] == report.deviation
    assert_runs(checkpoint, path, (2, 33, 50), (1, 128, 64))


def test_openvino_uses_its_own_operator_and_halves_its_weights(checkpoint, tmp_path):
    report = export_checkpoint(checkpoint, tmp_path / "a.xml", ExportOptions("openvino", "float16", (70, 40)))
    assert [path.name for path in report.files] == ["a.xml", "a.bin"]
    assert report.metadata.deform == "operator"
    assert '"DeformableConvolution"' in (tmp_path / "a.xml").read_text()
    weights = sum(value.numel() for value in checkpoint.network.values())
    assert (tmp_path / "a.bin").stat().st_size < 3 * weights
    assert report.deviation < 0.05  # is reported, refuses nothing
    class_logits, mask_logits = open_session(tmp_path / "a.xml").run(images(3, 70, 40))
    assert class_logits.shape == (3, 9, 20)
    assert mask_logits.shape == (3, 9, 24, 16)


@pytest.mark.slow
def test_torch_export_runs_where_this_package_is_not(checkpoint, tmp_path):
    """One size: any size takes minutes."""
    path = tmp_path / "a.pt2"
    export_checkpoint(checkpoint, path, ExportOptions("torch_export", size=(97, 64)))
    assert_runs(checkpoint, path, (1, 97, 64))
    np.save(tmp_path / "images.npy", images(1, 97, 64))
    code = (
        "import sys, numpy, torch\n"
        "program = torch.export.load('a.pt2').module()\n"
        "masks = program(torch.from_numpy(numpy.load('images.npy')))[1]\n"
        "numpy.save('masks.npy', masks.detach().numpy())\n"
        "assert not any(name.startswith('pem_lightning') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    wanted = open_session(path).run(images(1, 97, 64))[1]
    np.testing.assert_array_equal(np.load(tmp_path / "masks.npy"), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("results", ["semantic", "panoptic"])
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_results_in_the_graph(checkpoint, tmp_path, results, format):
    path = tmp_path / f"a{export_module.SUFFIXES[format]}"
    size = None if format == "onnx" and results == "semantic" else (97, 61)
    report = export_checkpoint(checkpoint, path, ExportOptions(format, size=size, results=results))
    assert report.deviation is None
    assert report.pixels == 0
    session, (image,) = open_session(path), images(1, 97, 61)
    given = checks.predict(load_trained(checkpoint), image[None])
    task = TaskInference(results, checkpoint.info.thing_classes, **checkpoint.config["task"]["inference"])
    wanted = task(Predictions(*given[:2]), (97, 61), (97, 61))
    if results == "semantic":
        (found,) = session.run(np.stack([image, image]))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found[0], wanted.semantic)
        np.testing.assert_array_equal(found[1], wanted.semantic)
    else:
        ids, table = session.run(image[None])
        assert ids.dtype == np.int32
        assert len(table) > 0
        np.testing.assert_array_equal(ids, wanted.panoptic)
        np.testing.assert_allclose(table, [(s.id, s.class_id, s.score) for s in wanted.segments], rtol=1e-4)
        with pytest.raises(UserError, match=r"gives the segments of one image at once, not of 2"):
            session.run(np.stack([image, image]))


def test_a_wrong_file_is_not_written(checkpoint, tmp_path, monkeypatch):
    """One size and a network without deformable convolutions: quicker."""
    path = tmp_path / "a.onnx"
    path.write_text("earlier")

    def wrong(*arguments):
        proto = to_onnx(*arguments)
        bias = next(w for w in proto.graph.initializer if w.name.endswith("class_head.bias"))
        values = onnx.numpy_helper.to_array(bias) + 0.5
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return proto

    to_onnx = export_module.to_onnx
    monkeypatch.setattr(export_module, "to_onnx", wrong)
    with pytest.raises(
        UserError, match=r"not the checkpoint's network \(deviation .*, so nothing was written"
    ) as error:
        export_checkpoint(checkpoint, path, ExportOptions(size=(64, 96), deform="operator"))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    assert path.read_text() == "earlier"


def test_empty_masks_are_part_of_the_check(checkpoint):
    network = load_trained(checkpoint)
    emptied = checks.empty_masks(network)
    assert (checks.predict(emptied, images(2, 64, 96)).mask_logits < 0).all()

    class Exact:
        metadata = type("Metadata", (), {"size": None, "results": None, "precision": "float32"})

        def run(self, images):
            return [x.numpy() for x in checks.predict(network, images)[:2]]

    def run_wrong(images):  # an empty mask that hides everything instead of nothing
        classes, masks = (x.numpy() for x in checks.predict(emptied, images)[:2])
        return classes + 1, masks

    assert checks.check(network, Exact(), None) == (0, 0, None)
    with pytest.raises(UserError, match=r"deviation"):
        checks.check(network, Exact(), run_wrong)


def test_a_file_may_be_as_far_off_as_float32_is_from_float64(checkpoint, monkeypatch):
    network = load_trained(checkpoint)
    graph = ExportGraph(network, "gather")
    monkeypatch.setattr(checks, "LIMITS", (0, 0, 0))

    class File:
        metadata = type("Metadata", (), {"size": None, "results": None, "precision": "float32"})
        error = 0

        @torch.no_grad()
        def run(self, images):
            return [x.numpy() + self.error for x in graph(torch.from_numpy(images))]

    file = File()
    assert 0 < checks.check(network, file, None).deviation < 1e-5
    file.error = 1e-3
    with pytest.raises(UserError, match="deviation"):
        checks.check(network, file, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "coreml"}, "format=coreml: choose onnx, openvino, litert, torch_export"),
        ({"precision": "int4"}, "precision=int4: choose float32, float16 or int8"),
        (
            {"format": "torch_export", "precision": "float16"},
            "precision=float16 is for format=onnx and",
        ),
        ({"format": "torch_export", "deform": "operator"}, "deform=operator is for format=onnx and"),
        ({"format": "litert"}, r"needs the size of its images: say size=\[512,1024\]"),
        ({"precision": "int8", "results": "panoptic"}, "say results=false"),
    ],
)
def test_choices_that_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ExportOptions(**options)


def test_what_cannot_be_traced_is_one_line():
    class Stubborn(torch.nn.Module):
        def forward(self, images):
            return images[: int(images.float().mean())]

    with pytest.raises(UserError, match=r"PyTorch cannot trace this network \(.*\): say size=") as error:
        export_module.trace(Stubborn())
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_line(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(export_module.MODULES, "onnx", ("onnx", "no_such_module"))
    with pytest.raises(UserError, match=r"needs no_such_module: pip install -r requirements-export.txt"):
        export_checkpoint(checkpoint, tmp_path / "a.onnx", ExportOptions())
    assert not list(tmp_path.iterdir())
