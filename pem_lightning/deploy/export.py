"""Writing a trained network as a file for another runtime: traced once, written in one of the formats."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from pem_lightning.checkpoints import Checkpoint, load_network
from pem_lightning.deploy.graph import ExportGraph
from pem_lightning.deploy.metadata import ENTRY, KEY, Metadata
from pem_lightning.deploy.network import Run
from pem_lightning.deploy.sessions import Session, open_session
from pem_lightning.models.pem import PEM
from pem_lightning.types import UserError

OPSET = 20
"""Of ONNX: the newest that TensorRT 10 reads."""
INPUT, OUTPUTS = "images", ("class_logits", "mask_logits")
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "torch_export": ".pt2"}
"""Format -> ending of the file."""

PROGRAMS = ("torch", "onnx", "onnxscript", "openvino", "nncf", "litert-torch", "pem-lightning")


@dataclass(frozen=True)
class ExportOptions:
    """What to write.

    Attributes:
        format: onnx, openvino, litert or torch_export.
        precision: float32; float16 for weights that are stored in half the bytes and computed with in float32; or int8.
        size: height and width of the only image that the file will take; None for any.
        deform: gather, grid_sample or operator; auto is what serves the format best.
        results: panoptic or semantic, to merge the logits in the graph; None for logits.

    Raises:
        UserError: a choice is not offered, or not together with another.
    """

    format: str = "onnx"
    precision: str = "float32"
    size: tuple[int, int] | None = None
    deform: str = "auto"
    results: str | None = None

    def __post_init__(self) -> None:
        if self.format not in SUFFIXES:
            raise UserError(f"format={self.format}: choose {', '.join(SUFFIXES)}")
        if self.precision not in ("float32", "float16", "int8"):
            raise UserError(f"precision={self.precision}: choose float32, float16 or int8")
        if self.precision == "int8" and self.format not in ("onnx", "openvino"):
            raise UserError(f"precision=int8 is for format=openvino and format=onnx, not for {self.format}")
        if self.format == "litert" and self.size is None:
            raise UserError("format=litert needs the size of its images: say size=[512,1024]")

    def how_to_sample(self, network: PEM) -> str:
        """`deform`, with auto decided."""
        if self.deform != "auto":
            return self.deform
        from pem_lightning.models.deformable_conv import DeformableConv

        has_convolutions = any(isinstance(m, DeformableConv) for m in network.modules())
        return "operator" if self.format == "openvino" and has_convolutions else "gather"


@dataclass(frozen=True)
class Calibration:
    """What int8 needs.

    Attributes:
        images: uint8 [1, H, W, 3], as the file will see them.
        measure: the metric in percent of a network, for accuracy control; None for none.
        max_drop: percent that accuracy control may lose.
    """

    images: Iterable[np.ndarray]
    measure: Callable[[Run], float] | None = None
    max_drop: float = 0.5


@dataclass(frozen=True)
class Report:
    """What was written, and how it compares.

    Attributes:
        metadata: of the file.
        files: one, or with OpenVINO two.
        megabytes: of all files.
        milliseconds, pytorch_milliseconds: of one image.
        deviation: largest difference of logits, relative to the largest logit.
        sign_flips: share of mask logits with another sign.
    """

    metadata: Metadata
    files: list[Path]
    megabytes: float
    milliseconds: float | None = None
    pytorch_milliseconds: float | None = None
    deviation: float | None = None
    sign_flips: float | None = None


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    *,
    calibration: Calibration | None = None,
    measure: Callable[[Session], dict[str, float]] | None = None,
) -> Report:
    """Write a checkpoint's network into a file (OpenVINO: two files).

    Args:
        checkpoint: what to export.
        output: the file.
        options: how.
        calibration: for int8.
        measure: the metrics of the file, which it then says about itself.

    Raises:
        UserError: the network cannot be exported so, a package is missing, or the file cannot be written.
    """
    network = load_trained(checkpoint)
    deform = options.how_to_sample(network)
    metadata = describe(checkpoint, options, deform)
    program = trace(ExportGraph(network, deform), options.size)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-") as folder:
        written = Path(folder) / output.name
        model = convert(program, metadata, calibration)
        save(model, written, metadata)
        if measure is not None:
            metadata = replace(metadata, quality=measure(open_session(written)))
            for part in Path(folder).iterdir():
                part.unlink()  # the open session may still look into the old file
            save(model, written, metadata)
        files = [output.with_suffix(part.suffix) for part in sorted(Path(folder).iterdir(), reverse=True)]
        for file in files:
            written.with_suffix(file.suffix).replace(file)
    return Report(metadata, files, sum(file.stat().st_size for file in files) / 1e6)


def convert(program: ExportedProgram, metadata: Metadata, calibration: Calibration | None = None) -> Any:
    """Translate a traced network into the format that its metadata names."""
    if metadata.format == "torch_export":
        return program
    model = to_onnx(program)
    if metadata.format == "openvino":
        model = to_openvino(model)
    if metadata.precision == "int8":
        from pem_lightning.deploy.quantize import quantize_onnx, quantize_openvino

        if calibration is None:
            raise UserError("precision=int8 needs images to calibrate with: python export.py gives it some")
        if metadata.format == "onnx":
            return quantize_onnx(model, calibration.images)
        return quantize_openvino(model, calibration.images, measure=calibration.measure, max_drop=calibration.max_drop)
    if metadata.precision == "float16" and metadata.format == "onnx":
        return store_in_float16(model)
    return model


def save(model: Any, path: Path, metadata: Metadata) -> None:
    """Write what `convert` made."""
    if metadata.format == "torch_export":
        torch.export.save(model, path, extra_files={ENTRY: metadata.to_json()})
    elif metadata.format == "onnx":
        del model.metadata_props[:]
        entry = model.metadata_props.add()
        entry.key, entry.value = KEY, metadata.to_json()
        path.write_bytes(model.SerializeToString())
    elif metadata.format == "openvino":
        import openvino

        model.set_rt_info(metadata.to_json(), KEY)
        openvino.save_model(model, path, compress_to_fp16=metadata.precision == "float16")


def store_in_float16(proto: Any) -> Any:
    """Store the weights of an `onnx.ModelProto` in float16; the graph casts them back, and computes as before."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for weight in proto.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and np.prod(weight.dims) >= 256:
            stored = numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), f"{weight.name}.float16")
            casts.append(helper.make_node("Cast", [stored.name], [weight.name], to=TensorProto.FLOAT))
            weight.CopyFrom(stored)
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def load_trained(checkpoint: Checkpoint) -> PEM:
    """The network of a checkpoint, in evaluation mode."""
    from hydra.utils import instantiate

    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    return network.eval()


def describe(checkpoint: Checkpoint, options: ExportOptions, deform: str) -> Metadata:
    """A file's metadata, before anything was measured."""
    task = checkpoint.config["task"]
    transform = checkpoint.config["recipe"]["eval_transform"]
    resize = {key: transform[key] for key in ("shortest_edge", "max_size") if key in transform}
    return Metadata(
        dataset_info=checkpoint.info,
        task={"name": task["name"], **task["inference"]},
        resize=resize if resize.get("shortest_edge") else None,
        size=options.size,
        format=options.format,
        precision=options.precision,
        deform=deform,
        results=options.results,
        config=checkpoint.config,
        overrides=checkpoint.overrides,
        step=checkpoint.step,
        checkpoint_sha256=hashlib.sha256(checkpoint.path.read_bytes()).hexdigest(),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in PROGRAMS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def trace(graph: ExportGraph, size: Sequence[int] | None = None) -> ExportedProgram:
    """Trace a network for images of one size, or of any size and number."""
    height, width = size or (96, 160)
    batch = 1 if size else 2  # of the example; a batch of 1 would be taken for the only one
    example = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    dynamic = None if size else ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    with torch.no_grad():
        return torch.export.export(graph.eval(), (example,), dynamic_shapes=dynamic, strict=False)


def to_onnx(program: ExportedProgram) -> Any:
    """Translate into an `onnx.ModelProto`."""
    from onnxscript import opset20

    def deform_conv(x: Any, offsets: Any, mask: Any, weight: Any) -> Any:
        return opset20.DeformConv(x, weight, offsets, None, mask, kernel_shape=[3, 3], pads=[1, 1, 1, 1])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            custom_translation_table={torch.ops.pem.deform_conv.default: deform_conv},
            verbose=False,
        )
    assert model is not None
    proto = model.model_proto
    del proto.metadata_props[:]
    for node in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del node.metadata_props[:]  # where each comes from in the source code
        if hasattr(node, "doc_string"):
            node.doc_string = ""
    return proto


def to_openvino(proto: Any) -> Any:
    """Convert an `onnx.ModelProto` into an `openvino.Model`; DeformConv becomes OpenVINO's own operator."""
    from openvino import opset8
    from openvino.frontend import ConversionExtension, FrontEndManager

    def deform_conv(node: Any) -> list[Any]:
        x, weight, offsets, _, mask = (node.get_input(i) for i in range(5))
        one, pads = [1, 1], [1, 1]
        out = opset8.deformable_convolution(
            x, offsets, weight, one, pads, pads, one, mask=mask, bilinear_interpolation_pad=True
        )
        return [out.output(0)]

    frontend = FrontEndManager().load_by_framework("onnx")
    frontend.add_extension(ConversionExtension("DeformConv", deform_conv))
    return frontend.convert(frontend.load(io.BytesIO(proto.SerializeToString())))
