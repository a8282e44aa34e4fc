"""INT8: weights and activations in 8 bits, their ranges taken from images of the training set at deployment size.

Offsets of deformable convolutions and products of two computed values (masks, similarities, attention) stay float: they
cost little, and an error there moves what is sampled, or which side of zero a mask lies on.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pem_lightning.basic_types import UserError
from pem_lightning.installation import install_command

OFFSET_CHANNELS = 27
"""Outputs of the convolution before a deformable one: two offsets and one modulation for each of 9 taps."""

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Images, uint8 [B, H, W, 3] -> class logits and mask logits."""


def quantize_openvino(
    model: Any, images: Iterable[np.ndarray], *, measure: Callable[[Run], float] | None = None, max_drop: float = 0.5
) -> Any:
    """Quantise an `openvino.Model` by NNCF.

    Args:
        model: whose input are uint8 images [B, H, W, 3].
        images: such images, for the ranges of activations.
        measure: the metric in percent of a network. If it is given, layers go back to float until the metric is at
            most `max_drop` below the float model's, which takes many evaluations.

    Raises:
        UserError: NNCF is not installed, or there are no images.
    """
    try:
        import nncf
    except ImportError as error:
        raise UserError(f"precision=int8 needs NNCF: {install_command('export')}") from error
    logging.getLogger("nncf").setLevel(logging.WARNING)
    listed = _not_empty(images)
    dataset = nncf.Dataset(listed)
    options: dict[str, Any] = {
        "preset": nncf.QuantizationPreset.MIXED,
        "ignored_scope": nncf.IgnoredScope(names=_stay_float_openvino(model)),
        "subset_size": len(listed),
    }
    if measure is None:
        return nncf.quantize(model, dataset, **options)

    def validate(compiled: Any, _: Iterable[Any]) -> tuple[float, None]:
        def run(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            classes, masks = compiled({0: x}).values()
            return np.array(classes), np.array(masks)

        return measure(run), None

    return nncf.quantize_with_accuracy_control(
        model,
        calibration_dataset=dataset,
        validation_dataset=nncf.Dataset([None]),
        validation_fn=validate,
        max_drop=max_drop,
        **options,
    )


def _stay_float_openvino(model: Any) -> list[str]:
    """Names of the operations that are not quantised."""
    names = []
    for node in model.get_ops():
        kind = node.get_type_name()
        computed = [not _is_constant(node.input_value(i).get_node()) for i in range(node.get_input_size())]
        offsets = kind == "Convolution" and node.output(0).get_partial_shape()[1] == OFFSET_CHANNELS
        if offsets or (kind == "MatMul" and all(computed)):
            names.append(node.get_friendly_name())
    return names


def _is_constant(node: Any) -> bool:
    """Whether a value depends on constants alone."""
    kind = node.get_type_name()
    if kind in ("Constant", "Parameter") or node.get_input_size() == 0:
        return kind == "Constant"
    return all(_is_constant(node.input_value(i).get_node()) for i in range(node.get_input_size()))


def quantize_onnx(proto: Any, images: Iterable[np.ndarray]) -> Any:
    """Quantise an `onnx.ModelProto` by ONNX Runtime: convolutions and linear layers, weights by channel.

    Args:
        proto: whose input are uint8 images [B, H, W, 3].
        images: such images, for the ranges of activations.

    Raises:
        UserError: ONNX Runtime is not installed, or there are no images.
    """
    try:
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise UserError(f"precision=int8 needs ONNX Runtime: {install_command('export')}") from error

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(_not_empty(images))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"images": image}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            path,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,  # 7 bits: products of 8 bits overflow on x86 without VNNI
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=_quantised_onnx(proto),
            extra_options={"CalibMovingAverage": False},
        )
        return onnx.load(path)


def _quantised_onnx(proto: Any) -> list[str]:
    """Names of the nodes to quantise; ONNX Runtime would take an empty list for all of them.

    Activation functions go with the layer before them. Else its output would get the range of all that the function
    cuts off, and few of the 256 steps would be left for ReLU6's 0 to 6.
    """
    shapes = {weight.name: tuple(weight.dims) for weight in proto.graph.initializer}
    layers = [
        node
        for node in proto.graph.node
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")
        and node.input[1] in shapes
        and not (node.op_type == "Conv" and shapes[node.input[1]][0] == OFFSET_CHANNELS)
    ]
    outputs = {name for layer in layers for name in layer.output}
    activations = [node for node in proto.graph.node if node.op_type in ("Relu", "Clip") and node.input[0] in outputs]
    return [node.name for node in (*layers, *activations)]


def _not_empty(images: Iterable[np.ndarray]) -> list[np.ndarray]:
    listed = list(images)
    if not listed:
        raise UserError("precision=int8 needs images of the training set to calibrate with: say calibration=64")
    return listed
