"""Exported files of every format, opened by the runtime that each belongs to. Nothing here needs PyTorch but .pt2."""

from __future__ import annotations

import importlib
import zipfile
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pem_lightning.basic_types import UserError
from pem_lightning.deploy.metadata import KEY, Metadata, read_zip_entry

Logits = tuple[np.ndarray, np.ndarray]
"""Class logits [B, Q, K + 1] and mask logits [B, Q, h, w]."""


def open_session(
    path: str | Path, *, threads: int | None = None, precision: str | None = None, device: str | None = None
) -> Session:
    """Open an exported file.

    Args:
        path: .onnx, .xml (OpenVINO), .tflite (LiteRT) or .pt2 (torch.export).
        threads: of the CPU; None leaves it to the runtime.
        precision: in which OpenVINO computes: "float32" or "bfloat16"; None for what the file was exported for.
        device: "cpu", or for .onnx "cuda" or "cuda:1"; None for the best that the runtime has.

    Raises:
        UserError: the file is missing, damaged or foreign, or its runtime is not installed.
    """
    path = Path(path)
    kind = SESSIONS.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path} is no exported file: give one with the ending {', '.join(SESSIONS)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist: export.py writes exported files")
    if precision not in (None, "float32", "bfloat16"):
        raise UserError(f"precision={precision}: choose float32 or bfloat16")
    if precision == "bfloat16" and kind is not OpenVINOSession:
        raise UserError(f"precision=bfloat16 is for OpenVINO's .xml files, not for {path.name}: leave it out")
    if device not in (None, "cpu") and kind is not ONNXSession:
        raise UserError(f"{path.name} runs on the CPU, not on device={device}: say device=cpu or auto")
    return kind(path, threads, precision, device)


def is_exported(path: str | Path) -> bool:
    """Whether a path has the ending of an exported file."""
    return Path(path).suffix.lower() in SESSIONS


class Session(ABC):
    """An open file: `metadata`, and `run`. Copies, also those in other processes, open the file anew."""

    runtime: str  # the module of the runtime
    package: str  # which installs it

    def __init__(self, path: Path, threads: int | None, precision: str | None, device: str | None = None) -> None:
        self.path = path
        self.device = device or "cpu"
        self._options = threads, precision, device
        try:
            library = importlib.import_module(self.runtime)
        except ImportError as error:
            raise UserError(f"{path.name} needs {self.package}: pip install {self.package}") from error
        try:
            text = self._open(library, threads, precision, device)
        except UserError:
            raise
        except Exception as error:  # every runtime has errors of its own for what is wrong with a file
            first = " ".join(str(error).split())[:200]
            raise UserError(f"{path} cannot be opened ({first}): it is damaged, or not of this format") from error
        self.metadata = Metadata.from_json(text, path)

    def __reduce__(self) -> Any:
        return type(self), (self.path, *self._options)

    def run(self, images: np.ndarray) -> Any:
        """Run RGB images, uint8 [B, H, W, 3]; one by one if the file is for one size.

        Returns:
            `Logits` in float32, the masks at a quarter of the size padded to multiples of 32. Of a file with results
            instead: classes [B, H, W]; or segment ids [H, W] and a table of id, class and score [N, 3].

        Raises:
            UserError: the file is for another size, or for one image at once.
        """
        size, (_, height, width, _) = self.metadata.size, images.shape
        if size is not None and size != (height, width):
            raise UserError(
                f"{self.path.name} takes images of {size[1]} x {size[0]} pixels, not {width} x {height}: "
                "resize them, or export with size=null"
            )
        if self.metadata.results == "panoptic" and len(images) != 1:
            raise UserError(f"{self.path.name} gives the segments of one image at once, not of {len(images)}")
        images = np.ascontiguousarray(images)
        if size is None or len(images) == 1:
            return tuple(self._run(images))
        outputs = [self._run(image[None]) for image in images]
        return tuple(np.concatenate(parts) for parts in zip(*outputs, strict=True))

    @abstractmethod
    def _open(self, library: Any, threads: int | None, precision: str | None, device: str | None) -> str | None:
        """Open `path`; returns the metadata's text."""

    @abstractmethod
    def _run(self, images: np.ndarray) -> Any:
        """Run uint8 images."""


class ONNXSession(Session):
    """ONNX Runtime."""

    runtime = package = "onnxruntime"

    def _open(self, library: Any, threads: int | None, precision: str | None, device: str | None) -> str | None:
        options = library.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        available = library.get_available_providers()
        cuda = "CUDAExecutionProvider"
        if device not in (None, "cpu") and cuda not in available:
            raise UserError(f"ONNX Runtime has no device={device} here: say device=cpu, or install onnxruntime-gpu")
        providers: list[Any] = [p for p in available if p in (cuda, "CPUExecutionProvider")]
        if device is not None:
            number = {"device_id": int(device.partition(":")[2] or 0)}
            providers = ["CPUExecutionProvider"] if device == "cpu" else [(cuda, number), "CPUExecutionProvider"]
        self.session = library.InferenceSession(str(self.path), options, providers=providers)
        if device is None and cuda in self.session.get_providers():
            self.device = "cuda"
        return self.session.get_modelmeta().custom_metadata_map.get(KEY)

    def _run(self, images: np.ndarray) -> Any:
        return self.session.run(None, {"images": images})


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process, for ever.

    With its first model, OpenVINO gives the calling thread another stack for signal handlers, and frees it with its
    last one, be it in another thread: the next handled signal then kills the process (OpenVINO 2026.4). A DataLoader's
    worker that ends sends one.
    """
    return importlib.import_module("openvino").Core()


class OpenVINOSession(Session):
    """OpenVINO on the CPU."""

    runtime = package = "openvino"

    def _open(self, library: Any, threads: int | None, precision: str | None, device: str | None) -> str | None:
        weights = self.path.with_suffix(".bin")
        if not weights.is_file():
            raise UserError(f"{weights} is missing: a model of OpenVINO is two files, keep them side by side")
        with self.path.open("rb") as file:
            if b"<net " not in file.read(1000):
                raise UserError(f"{self.path} is damaged or is no model of OpenVINO")
        core = openvino_core()
        model = core.read_model(self.path)
        text = model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None
        hint = {"bfloat16": "bf16"}.get(precision or "", "f32")
        settings = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        if threads:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self.model = core.compile_model(model, "CPU", settings)
        return text

    def _run(self, images: np.ndarray) -> Any:
        found = self.model({"images": images})
        return tuple(np.asarray(found[output]) for output in self.model.outputs)


class LiteRTSession(Session):
    """LiteRT (TensorFlow Lite)."""

    runtime, package = "ai_edge_litert.interpreter", "ai-edge-litert"

    def _open(self, library: Any, threads: int | None, precision: str | None, device: str | None) -> str | None:
        self.interpreter = library.Interpreter(model_path=str(self.path), num_threads=threads)
        self.interpreter.allocate_tensors()
        return read_zip_entry(self.path)

    def _run(self, images: np.ndarray) -> Any:
        self.interpreter.set_tensor(self.interpreter.get_input_details()[0]["index"], images)
        self.interpreter.invoke()
        outputs = sorted(self.interpreter.get_output_details(), key=lambda output: len(output["shape"]))
        return tuple(self.interpreter.get_tensor(output["index"]) for output in outputs)


class TorchSession(Session):
    """A program of torch.export."""

    runtime = package = "torch"

    def _open(self, library: Any, threads: int | None, precision: str | None, device: str | None) -> str | None:
        if not zipfile.is_zipfile(self.path):
            raise UserError(f"{self.path} is damaged or is no file of torch.export")
        import torch.export

        extra = {f"{KEY}.json": ""}
        self.program = torch.export.load(self.path, extra_files=extra).module()
        return extra[f"{KEY}.json"] or None

    def _run(self, images: np.ndarray) -> Any:
        import torch

        with torch.no_grad():
            return tuple(output.numpy() for output in self.program(torch.from_numpy(images)))


SESSIONS: dict[str, type[Session]] = {
    ".onnx": ONNXSession,
    ".xml": OpenVINOSession,
    ".tflite": LiteRTSession,
    ".pt2": TorchSession,
}
"""By the file's ending."""
