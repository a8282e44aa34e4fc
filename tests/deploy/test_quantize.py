"""INT8: what is quantised, and how close it stays. A network small enough to be written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pem_lightning.basic_types import UserError
from pem_lightning.deploy.quantize import OFFSET_CHANNELS, quantize_onnx, quantize_openvino
from pem_lightning.deploy.sessions import openvino_core

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture
def proto() -> Any:
    """A convolution, offsets from it, and the products of its pixels with one another and with weights."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    weights = {
        "body.weight": rng.normal(size=(8, 3, 3, 3)) / 60,
        "offset.weight": rng.normal(size=(OFFSET_CHANNELS, 8, 3, 3)) / 9,
        "linear.weight": rng.normal(size=(8, 5)),
    }
    nodes = [
        helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT, name="cast"),
        helper.make_node("Transpose", ["float"], ["x"], perm=[0, 3, 1, 2], name="transpose"),
        helper.make_node("Conv", ["x", "body.weight"], ["body"], pads=[1, 1, 1, 1], name="body"),
        helper.make_node("Relu", ["body"], ["y"], name="relu"),
        helper.make_node("Conv", ["y", "offset.weight"], ["offsets"], pads=[1, 1, 1, 1], name="offset"),
        helper.make_node("Reshape", ["y", "shape"], ["pixels"], name="reshape"),
        helper.make_node("Transpose", ["pixels"], ["rows"], perm=[0, 2, 1], name="rows"),
        helper.make_node("MatMul", ["rows", "pixels"], ["similarity"], name="similarity"),
        helper.make_node("MatMul", ["rows", "linear.weight"], ["linear"], name="linear"),
    ]
    initializers = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([0, 8, -1]), "shape"))
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("offsets", "similarity", "linear")
    ]
    graph = helper.make_graph(nodes, "tiny", [images], outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _images(count: int = 3) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    return (rng.integers(0, 256, (1, 12, 16, 3), np.uint8) for _ in range(count))


def _run(model: Any, image: np.ndarray) -> list[np.ndarray]:
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"images": image})


def _deviation(got: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))


def test_onnx_weights_become_bytes_but_for_offsets(proto: Any) -> None:
    (image,) = _images(1)
    wanted = _run(proto, image)
    quantized = quantize_onnx(proto, _images())
    bytes_of = {
        w.name.removesuffix("_quantized") for w in quantized.graph.initializer if w.data_type == onnx.TensorProto.INT8
    }
    assert {"body.weight", "linear.weight"} <= bytes_of
    assert "offset.weight" not in bytes_of
    assert 0 < _deviation(_run(quantized, image), wanted) < 0.05


def test_onnx_takes_the_range_behind_an_activation(proto: Any) -> None:
    from onnx import helper, numpy_helper

    limits = (numpy_helper.from_array(np.float32(value), name) for name, value in (("low", 0), ("high", 0.5)))
    proto.graph.initializer.extend(limits)
    proto.graph.node[3].CopyFrom(helper.make_node("Clip", ["body", "low", "high"], ["y"], name="clip"))
    quantized = quantize_onnx(proto, _images()).graph
    values = {value.name: numpy_helper.to_array(value) for value in quantized.initializer}
    scale_of = {node.input[0]: values[node.input[1]] for node in quantized.node if node.op_type == "QuantizeLinear"}
    (body,) = (node.output[0] for node in quantized.node if node.name == "body")
    followers = [node.op_type for node in quantized.node if body in node.input]
    assert followers == ["QuantizeLinear"]  # whose range does what the clipping did
    assert scale_of[body] == pytest.approx(0.5 / 255, rel=0.01)


def test_openvino_quantises_the_same(proto: Any) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")

    def read() -> Any:
        return openvino_core().read_model(proto.SerializeToString())

    def run(model: Any, image: np.ndarray) -> list[np.ndarray]:
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        return [np.array(v) for v in openvino_core().compile_model(model, "CPU", settings)({0: image}).values()]

    (image,) = _images(1)
    wanted = run(read(), image)
    quantized = quantize_openvino(read(), _images())
    in_bytes = {
        op.get_friendly_name().split("/")[0]
        for op in quantized.get_ops()
        if op.get_type_name() in ("Convolution", "MatMul")
        and any("FakeQuantize" in _ancestors(op.input_value(i).get_node()) for i in range(2))
    }
    assert {"body", "linear"} <= in_bytes
    assert not {"offset", "similarity"} & in_bytes
    assert 0 < _deviation(run(quantized, image), wanted) < 0.05


def _ancestors(node: Any) -> set[str]:
    """Kinds of the operations directly before, through changes of type and shape."""
    kinds = {node.get_type_name()}
    if node.get_type_name() in ("Convert", "Multiply", "Reshape", "Transpose"):
        for i in range(node.get_input_size()):
            kinds |= _ancestors(node.input_value(i).get_node())
    return kinds


@pytest.mark.parametrize("quantize", [quantize_onnx, quantize_openvino])
def test_no_images_is_one_line(quantize: Any, proto: Any) -> None:
    if quantize is quantize_openvino:
        pytest.importorskip("nncf")
    with pytest.raises(UserError, match="calibration=64"):
        quantize(proto, [])
