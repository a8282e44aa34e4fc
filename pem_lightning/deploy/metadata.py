"""What an exported file says about itself: one JSON text, under the same key in every format. Needs NumPy alone."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pem_lightning.basic_types import DatasetInfo, UserError

KEY = "pem_lightning"
"""Of the JSON text in ONNX's metadata and OpenVINO's rt_info; `ENTRY` where the format is a zip archive."""
ENTRY = f"{KEY}.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Metadata:
    """Everything that a caller needs to use a file, and how it came about.

    Attributes:
        dataset_info: the classes.
        task: name, thresholds and rules of post-processing, as `TaskInference` takes them.
        resize: shortest_edge and max_size of evaluation's resizing; None for images at their own size.
        size: height and width of the only image that the file takes; None for any.
        format: onnx, openvino, litert or torch_export.
        precision: float32, float16 or int8.
        deform: how deformable operators sample.
        results: what is merged in the graph: panoptic, semantic, or None for logits.
        config: the experiment that the checkpoint was trained with.
        overrides: of its command line.
        step: how long it was trained.
        checkpoint_sha256: of the checkpoint's file.
        versions: of the programs that wrote the file.
        checks: what the file's own check found.
        quality: measured on the validation set, by the metric's name; None where it was not measured.
    """

    dataset_info: DatasetInfo
    task: dict[str, Any]
    resize: dict[str, Any] | None
    size: tuple[int, int] | None
    format: str
    precision: str
    deform: str
    results: str | None
    config: dict[str, Any]
    overrides: list[str]
    step: int
    checkpoint_sha256: str
    versions: dict[str, str] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The text that files hold."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | None, path: Path) -> Metadata:
        """Inverse of `to_json`.

        Raises:
            UserError: the text is missing, is none of ours, or is of a newer version.
        """
        if text is None:
            raise UserError(f"{path} says nothing about classes and sizes: it was not written by export.py")
        try:
            state = json.loads(text)
            if state["format_version"] > FORMAT_VERSION:
                raise UserError(f"{path} was exported by a newer version of this package: update it, or export again")
            state["dataset_info"] = DatasetInfo.from_dict(state["dataset_info"])
            state["size"] = state["size"] and tuple(state["size"])
            return cls(**{f.name: state[f.name] for f in fields(cls) if f.name in state})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the metadata of {path} cannot be read: export the checkpoint again") from error


def read_zip_entry(path: Path) -> str | None:
    """The metadata of a file that is, or ends in, a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith(ENTRY)), None)
            return None if name is None else archive.read(name).decode()
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
