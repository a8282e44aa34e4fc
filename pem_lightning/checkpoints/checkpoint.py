"""Our own checkpoints, as train.py writes them."""

from __future__ import annotations

import importlib
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pem_lightning.types import DatasetInfo, UserError

CHECKPOINT_KEY = "pem_lightning"
"""Where a Lightning checkpoint keeps what is ours."""

_NETWORK_PREFIX = "network."


class Checkpoint(NamedTuple):
    """One of our checkpoints, as far as evaluation and prediction need it.

    Attributes:
        path: where it was read from.
        step: how long it was trained.
        config: the composed experiment.
        overrides: the command line's part of it.
        info: the classes it knows.
        network: weights, by the network's own names; averaged ones if the training averaged them.
        raw: the last step's weights beside averaged ones, else None.
        resumable: whether it has all that a training needs to go on.
    """

    path: Path
    step: int
    config: dict[str, Any]
    overrides: list[str]
    info: DatasetInfo
    network: dict[str, Tensor]
    raw: dict[str, Tensor] | None = None
    resumable: bool = True


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that train.py wrote. Only plain data is unpickled, so a foreign file can do no harm.

    Raises:
        UserError: the file is missing, damaged, or not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: train.py writes them to outputs/<experiment>/checkpoints")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return parse_checkpoint(path, content)
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        raise UserError(f"{path} is damaged or was not written by train.py: give one of its .ckpt files") from error


def parse_checkpoint(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """Find our own in what a checkpoint's file holds."""
    ours, state = content[CHECKPOINT_KEY], content["state_dict"]
    network, raw = _network_weights(state), _network_weights(content.get("current_model_state", {})) or None
    if "averaged" in ours:  # an older checkpoint
        network, raw = ours["averaged"]["weights"], network
    return Checkpoint(
        path=path,
        step=content["global_step"],
        config=ours["config"],
        overrides=ours["overrides"],
        info=DatasetInfo.from_dict(ours["dataset_info"]),
        network=network,
        raw=raw,
        resumable="optimizer_states" in content,
    )


def _network_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(_NETWORK_PREFIX): v for k, v in state.items() if k.startswith(_NETWORK_PREFIX)}


def load_network(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights, all of them.

    Raises:
        UserError: they do not fit the network.
    """
    check_fits(network, checkpoint)
    network.load_state_dict(checkpoint.network, strict=True)


def check_fits(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Compare names and shapes.

    Raises:
        UserError: some differ; the message names the first.
    """
    wanted, given = network.state_dict(), checkpoint.network
    problems = [f"{k} is missing" for k in wanted if k not in given]
    problems += [f"{k} is not known" for k in given if k not in wanted]
    problems += [
        f"{k} has shape {list(given[k].shape)} instead of {list(v.shape)}"
        for k, v in wanted.items()
        if k in given and given[k].shape != v.shape
    ]
    if problems:
        raise UserError(
            f"{checkpoint.path} does not fit the network ({problems[0]}; {len(problems)} differences): "
            "use the backbone, network and data set it was trained with"
        )


_ZIP = b"PK\x03\x04"
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
"""The first object in a file of torch.save before PyTorch 1.6, which was several pickles in a row."""


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

    def __new__(cls, *_: Any) -> PickledArray:
        """Make an empty one."""
        return super().__new__(cls)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data  # a string of Python 2
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(data: Any, dtype: PickledDType, shape: tuple[int, ...], order: str, *_: Any) -> PickledArray:
    if order not in ("C", "F"):
        raise pickle.UnpicklingError(f"an array in the order {order!r}")
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: PickledDType, data: Any) -> bool | int | float:
    data = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(data, dtype.dtype)[0].item()


def _no_bytes() -> bytes:
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
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _latin1,
}


class _ForbiddenError(pickle.UnpicklingError):
    """A pickle asks for what weights have no need of."""


class _PlainUnpickler(pickle.Unpickler):
    """Knows dictionaries, lists, strings, numbers and arrays of numbers, and nothing that could be called."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up the few names that arrays need."""
        if f"{module}.{name}" not in _PLAIN:
            raise _ForbiddenError(f"{module}.{name}")
        return _PLAIN[f"{module}.{name}"]


def read_content(path: Path) -> Mapping[Any, Any]:
    """Read a file of PyTorch's, a plain pickle (of Python 2, too) or a safetensors file; what it is shows by content.

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


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(9)
        if head.startswith(_ZIP):
            return _read_torch(path)
        if head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return _read_safetensors(path)
        file.seek(0)
        content = _PlainUnpickler(file, encoding="latin1").load()
    return _read_torch(path) if content == _TORCH_MAGIC else content


def _read_torch(path: Path) -> Any:
    allowed: list[Any] = [(stand_in, name) for name, stand_in in _NUMPY.items()]
    allowed.append((_no_bytes, "builtins.bytes"))
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise _ForbiddenError(match[1]) from error
        _, _, reason = str(error).partition("WeightsUnpickler error: ")  # around it is advice for programmers
        raise pickle.UnpicklingError(reason.strip() or str(error)) from error


def _read_safetensors(path: Path) -> Any:
    try:
        load_file = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: pip install safetensors") from error
    return load_file(path)


def as_tensor(value: Any) -> Tensor | None:
    """A tensor of what stood for one in a file; None for anything else, such as a step count."""
    if isinstance(value, PickledArray):
        return torch.from_numpy(value.array.astype(value.array.dtype.newbyteorder("=")))
    return value.detach() if isinstance(value, Tensor) else None
