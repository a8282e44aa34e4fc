"""Reading files that nobody vouches for: PyTorch's, pickles (of Python 2, too) and safetensors. Nothing is executed."""

from __future__ import annotations

import importlib
import json
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pem_lightning.types import UserError

CHECKPOINT_KEY = "pem_lightning"
"""The entry of our checkpoints that nobody else's files have."""
_ZIP = b"PK\x03\x04"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""The first object in a file of torch.save before PyTorch 1.6, which was several pickles in a row."""


def read_content(path: Path) -> Mapping[Any, Any]:
    """Read a file; of which kind it is shows by its content.

    Raises:
        UserError: it is damaged, no dictionary, or asks to execute something.
    """
    try:
        content = _read(path)
    except _ForbiddenError as error:
        raise UserError(
            f"{path} asks for {error}, which is no plain data: nothing was executed; take weights from their authors, "
            "saved as a plain state dict"
        ) from error
    except UserError:
        raise
    except Exception as error:  # pickle, torch.load and safetensors have no common error for a file that is wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0].removesuffix(": ")
        raise UserError(f"{path} is damaged or no file of weights ({reason}): get it again") from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__} and no weights by name: save a state dict")
    return content


def as_tensor(value: Any) -> Tensor | None:
    """The tensor that a value in a file stands for; None for anything else, such as a step count."""
    if isinstance(value, PickledArray):
        return torch.from_numpy(value.array.astype(value.array.dtype.newbyteorder("=")))
    return value.detach() if isinstance(value, Tensor) else None


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
        if head.startswith(_ZIP):
            return _read_torch(path)
        if is_safetensors(path):
            return read_safetensors(path)
        file.seek(0)
        content = _PlainUnpickler(file, encoding="latin1").load()
    return _read_torch(path) if content == _TORCH_MAGIC else content


def is_safetensors(path: Path) -> bool:
    """Whether a file looks like one of safetensors: the length of a header, and its JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors by name; of a checkpoint of ours (see `safetensors_bytes`) its whole content."""
    content = import_safetensors(path).load_file(path)
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    record = header.get("__metadata__", {}).get(CHECKPOINT_KEY)
    return content if record is None else {"state_dict": content, **json.loads(record)}


def safetensors_bytes(path: Path, content: Mapping[str, Any]) -> bytes:
    """Tensors by name as a file of safetensors; of a checkpoint of ours all but the tensors goes into the metadata."""
    tensors: Mapping[str, Tensor] = content.get("state_dict", content)
    packed = {name: tensor.contiguous() for name, tensor in tensors.items()}  # trained ones may be channels-last
    record = {key: value for key, value in content.items() if key != "state_dict"}
    metadata = {CHECKPOINT_KEY: json.dumps(record)} if CHECKPOINT_KEY in content else None
    return import_safetensors(path).save(packed, metadata)


def import_safetensors(path: Path) -> Any:
    """The package's functions for PyTorch; raises `UserError` if it is not installed."""
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error


def _read_torch(path: Path) -> Any:
    allowed: list[Any] = [(_empty, "builtins.bytes"), *((stand_in, name) for name, stand_in in _NUMPY.items())]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _ForbiddenError(match[1]) from error
        _, _, reason = str(error).partition("WeightsUnpickler error: ")  # around it is advice for programmers
        raise pickle.UnpicklingError(reason.strip() or str(error)) from error


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle asks for what weights do not need."""


class _PlainUnpickler(pickle.Unpickler):
    """Knows dictionaries, lists, strings, numbers and arrays of numbers, and nothing that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _PLAIN:
            raise _ForbiddenError(f"{module}.{name}")
        return _PLAIN[f"{module}.{name}"]


class PickledDType:
    """Stands for `numpy.dtype` in a pickle. NumPy's own would believe whatever the pickle says about memory."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", str(code)):
            raise pickle.UnpicklingError(f"an array of {code!r}, which are no numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class PickledArray:
    """Stands for `numpy.ndarray` in a pickle, which makes an empty one, whatever the arguments, and fills it."""

    array: np.ndarray = np.zeros(0, np.float32)

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(_bytes(data), dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(data: Any, dtype: PickledDType, shape: tuple[int, ...], order: str, *_: Any) -> PickledArray:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array in the order {order!r}")
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: PickledDType, data: Any) -> bool | int | float:
    return np.frombuffer(_bytes(data), dtype.dtype)[0].item()


def _bytes(data: Any) -> Any:
    """Memory is text in pickles of Python 2."""
    return data.encode("latin1") if isinstance(data, str) else data


def _empty() -> bytes:
    """An empty array's memory in Python 2's protocol."""
    return b""


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


_NUMPY: dict[str, Any] = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledDType,
    **{f"numpy.{core}.multiarray._reconstruct": PickledArray for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_from_buffer for core in ("core", "_core")},
}
_PLAIN = {
    **_NUMPY,
    "__builtin__.bytes": _empty,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
}
