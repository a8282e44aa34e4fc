"""Writing a trained network as a file for another runtime: traced once, written in one of the formats."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from pem_lightning.checkpoints import Checkpoint, load_network
from pem_lightning.deploy import merge
from pem_lightning.deploy.check import RunFile, check, empty_mask_biases, measure_times
from pem_lightning.deploy.graph import ExportGraph
from pem_lightning.deploy.metadata import ENTRY, KEY, Metadata
from pem_lightning.deploy.network import Run
from pem_lightning.deploy.sessions import Session, open_session, openvino_core
from pem_lightning.inference.optimize import shorten
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.installation import install_command, job_command
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.pem import PEM
from pem_lightning.types import UserError

OPSET = 20
"""Of ONNX: the newest that TensorRT 10 reads."""
INPUT = "images"
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "litert": ".tflite", "torch_export": ".pt2"}
"""Format -> ending of the file."""
MODULES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "litert": ("litert_torch", "ai_edge_litert"),
    "torch_export": (),
}
"""Format -> what must be installed."""
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
        if self.deform not in ("auto", "gather", "grid_sample", "operator"):
            raise UserError(f"deform={self.deform}: choose auto, gather, grid_sample or operator")
        if self.format in ("torch_export", "litert"):
            for key, value, usual in (("precision", self.precision, "float32"), ("deform", self.deform, "auto")):
                if value in ("float16", "int8", "operator"):
                    others = "is for format=onnx and format=openvino"
                    raise UserError(f"{key}={value} {others}, not for {self.format}: say {key}={usual}")
        if self.results and (self.precision == "int8" or self.format == "litert"):
            raise UserError(f"results={self.results} is not for int8 and not for litert: say results=false")
        if self.format == "litert" and self.size is None:
            raise UserError("format=litert needs the size of its images: say size=[512,1024]")

    def how_to_sample(self, network: PEM) -> str:
        """`deform`, with auto decided."""
        if self.deform != "auto":
            return self.deform
        return "operator" if self.format == "openvino" and _has_deformable_conv(network) else "gather"


def _has_deformable_conv(network: PEM) -> bool:
    return any(isinstance(module, DeformableConv) for module in network.modules())


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
        milliseconds, pytorch_milliseconds: of one image of `size` or of 512 x 1024, where the file gives logits.
        deviation: largest difference of logits, relative to the largest logit.
        sign_flips: share of mask logits with another sign.
        pixels: share of pixels that differ, where the file gives maps.
    """

    metadata: Metadata
    files: list[Path]
    megabytes: float
    milliseconds: float | None = None
    pytorch_milliseconds: float | None = None
    deviation: float | None = None
    sign_flips: float | None = None
    pixels: float | None = None


def export_checkpoint(
    checkpoint: Checkpoint,
    output: Path,
    options: ExportOptions,
    *,
    calibration: Calibration | None = None,
    measure: Callable[[Session], dict[str, float]] | None = None,
) -> Report:
    """Write a checkpoint's network into a file (OpenVINO: two files), once it has proved equal.

    Args:
        checkpoint: what to export.
        output: the file.
        options: how.
        calibration: for int8.
        measure: the metrics of the file, which it then says about itself.

    Raises:
        UserError: the network cannot be exported so, a package is missing, the file cannot be written, or it is not
            the checkpoint's network. An earlier file then stays as it is.
    """
    if missing := [name for name in MODULES[options.format] if importlib.util.find_spec(name) is None]:
        hint = "see docs/deploy.md" if options.format == "litert" else install_command("export")
        raise UserError(f"format={options.format} needs {missing[0]}: {hint}")
    network = load_trained(checkpoint)
    metadata = describe(checkpoint, options, options.how_to_sample(network))
    program = trace(build_graph(network, metadata), options.size, one_image=options.results == "panoptic")
    output.parent.mkdir(parents=True, exist_ok=True)
    # Windows deletes no file that is open, so the checked one lies apart and is left to its session.
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".export-", ignore_cleanup_errors=True) as folder:
        written, checked = Path(folder) / "written", Path(folder) / "checked"
        written.mkdir()
        checked.mkdir()
        model, run_empty = convert(program, metadata, calibration)
        save(model, checked / output.name, metadata)
        session = open_session(checked / output.name)
        difference = check(network, session, run_empty, _inference(metadata))
        checks: dict[str, Any] = difference._asdict()
        if options.results is None:
            checks |= measure_times(network, session)._asdict()
        metadata = replace(metadata, checks=checks, quality=measure(session) if measure else None)
        save(model, written / output.name, metadata)
        parts = sorted(written.iterdir(), reverse=True)
        files = [part.replace(output.with_suffix(part.suffix)) for part in parts]
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    return Report(metadata, files, megabytes, **{key: value for key, value in checks.items() if key != "size"})


def build_graph(network: PEM, metadata: Metadata) -> torch.nn.Module:
    """What is traced. ONNX gets its deformable convolutions in translation: see `onnx_deform_conv`."""
    translated = metadata.format in ("onnx", "openvino") and _has_deformable_conv(network)
    inference = metadata.task
    return merge.merge(
        ExportGraph(network, "operator" if translated else metadata.deform),
        metadata.results,
        thing_classes=metadata.dataset_info.thing_classes,
        num_classes=metadata.dataset_info.num_classes,
        **{key: inference[key] for key in ("object_mask_threshold", "overlap_threshold") if key in inference},
    )


def _inference(metadata: Metadata) -> TaskInference | None:
    """What makes the maps that a file gives."""
    if metadata.results is None:
        return None
    rules = {key: value for key, value in metadata.task.items() if key != "name"}
    return TaskInference(metadata.results, metadata.dataset_info.thing_classes, **rules)


def convert(
    program: ExportedProgram, metadata: Metadata, calibration: Calibration | None = None
) -> tuple[Any, RunFile | None]:
    """Translate a traced network into the format that its metadata names.

    Returns:
        The model, and what runs it with the values of `empty_mask_biases`.
    """
    if metadata.format == "torch_export":
        return program, _run_program(program)
    if metadata.format == "litert":
        return to_litert(program), None
    proto = to_onnx(program, metadata.deform, merge.OUTPUTS[metadata.results])
    return _convert_onnx(proto, metadata, calibration), _run_onnx(proto, metadata.format)


def _convert_onnx(proto: Any, metadata: Metadata, calibration: Calibration | None) -> Any:
    model = to_openvino(proto) if metadata.format == "openvino" else _copy(proto)
    if metadata.precision == "int8":
        from pem_lightning.deploy.quantize import quantize_onnx, quantize_openvino

        if calibration is None:
            raise UserError(f"precision=int8 needs images to calibrate with: {job_command('export')} gives it some")
        if metadata.format == "onnx":
            return quantize_onnx(model, calibration.images)
        return quantize_openvino(model, calibration.images, measure=calibration.measure, max_drop=calibration.max_drop)
    if metadata.precision == "float16" and metadata.format == "onnx":
        return store_in_float16(model)
    return model


def _copy(proto: Any) -> Any:
    copied = type(proto)()
    copied.CopyFrom(proto)
    return copied


def _run_program(program: ExportedProgram) -> RunFile:
    changed = copy.deepcopy(program.module())  # which shares its weights with the program
    state = changed.state_dict()
    for name, value in empty_mask_biases(state).items():
        state[name].fill_(value)

    @torch.no_grad()
    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(output.numpy() for output in changed(torch.from_numpy(images)))

    return run


def _run_onnx(proto: Any, format: str) -> RunFile:
    from onnx import numpy_helper

    changed = _copy(proto)
    biases = {weight.name: weight for weight in changed.graph.initializer}
    for name, value in empty_mask_biases(biases).items():
        filled = np.full(tuple(biases[name].dims), value, np.float32)
        biases[name].CopyFrom(numpy_helper.from_array(filled, name))
    if format == "openvino":
        compiled = openvino_core().compile_model(to_openvino(changed), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: tuple(np.array(value) for value in compiled({INPUT: images}).values())
    import onnxruntime

    session = onnxruntime.InferenceSession(changed.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(None, {INPUT: images}))


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
    elif metadata.format == "litert":
        model.export(str(path))
        with zipfile.ZipFile(path, "a") as archive:  # at the file's end, where LiteRT does not look
            archive.writestr(ENTRY, metadata.to_json())


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
    """The network of a checkpoint, in evaluation mode, with what its configuration's `inference` leaves out."""
    from hydra.utils import instantiate

    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    inference = checkpoint.config.get("inference", {})  # which older checkpoints have without these keys
    return cast(PEM, shorten(network, inference.get("decoder_layers"), inference.get("queries"))).eval()


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


def trace(graph: torch.nn.Module, size: Sequence[int] | None = None, *, one_image: bool = False) -> ExportedProgram:
    """Trace a network for images of one size, or of any size and (but for `one_image`) number."""
    height, width = size or (96, 160)
    batch = 1 if size or one_image else 2  # of the example; a batch of 1 is taken for the only one
    example = torch.zeros(batch, height, width, 3, dtype=torch.uint8)
    any_size = {1: Dim.AUTO, 2: Dim.AUTO} if one_image else {0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO}
    with torch.no_grad():
        try:
            return torch.export.export(
                graph.eval(), (example,), dynamic_shapes=None if size else (any_size,), strict=False
            )
        except UserError:
            raise
        except Exception as error:  # a backbone of another library may hold anything
            hint = "export another backbone" if size else "say size=[512,1024]"
            raise UserError(f"PyTorch cannot trace this network ({_first_line(error)}): {hint}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def to_onnx(program: ExportedProgram, deform: str = "operator", outputs: Sequence[str] = merge.OUTPUTS[None]) -> Any:
    """Translate into an `onnx.ModelProto`.

    Args:
        program: a traced network.
        deform: what becomes of traced operators `pem::deform_conv`.
        outputs: their names.

    Raises:
        UserError: an operator of the network has no translation.
    """
    from pem_lightning.deploy.onnx_deform_conv import DEFORMABLE_CONVOLUTIONS

    for name in ("onnxscript", "torch.onnx"):  # what they cannot simplify is no news
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(outputs),
                custom_translation_table={torch.ops.pem.deform_conv.default: DEFORMABLE_CONVOLUTIONS[deform]},
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"this network cannot be translated to ONNX ({_first_line(error)}): try format=torch_export"
            ) from error
    assert model is not None
    proto = model.model_proto
    del proto.metadata_props[:]
    for node in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del node.metadata_props[:]  # where each comes from in the source code
        node.doc_string = ""
    _name_sizes(proto)
    return proto


def _name_sizes(proto: Any) -> None:
    """Call the input's dynamic sizes batch, height and width, also where others are computed from them."""
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    names = {d.dim_param: name for d, name in zip(dims, ("batch", "height", "width"), strict=False) if d.dim_param}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), dim.dim_param)


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


def to_litert(program: ExportedProgram) -> Any:
    """Convert into a model of LiteRT, which is for one size."""
    import litert_torch

    (example,), _ = program.example_inputs
    return litert_torch.convert(program.module(), (example,))
