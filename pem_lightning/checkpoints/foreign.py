"""Recognising whose weights a file holds, by its content, and their names in ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pem_lightning.checkpoints.official import rename_official_key, translate_official
from pem_lightning.checkpoints.own import CHECKPOINT_KEY, parse_checkpoint
from pem_lightning.checkpoints.reading import as_tensor
from pem_lightning.errors import UserError

_CAFFE2_NAME = re.compile(r"(res\d_\d+_branch\w+|conv1|res_conv1_bn)_[wbs]")
_OWN_NAME = re.compile(r"(pixel_decoder|transformer_decoder|backbone\.(conv1|bn1|layer\d|features|model))\.")
_DETECTRON2_NAME = re.compile(r"(stem\.conv1|res[2-5]\.\d+\.\w+)\.")
_RESNET_NAME = re.compile(r"(conv1|bn1|layer[1-4])\.")


class Weights(NamedTuple):
    """What a file of weights holds.

    Attributes:
        source: its path or name.
        kind: whose format it is.
        state: weights by our network's names.
        leftovers: names of the file that have no counterpart.
        classes: the classes that the class head knows, where the file says so.
        ours: whether the names were ours as they are.
    """

    source: str
    kind: str
    state: dict[str, Tensor]
    leftovers: list[str]
    classes: tuple[str, ...] | None = None
    ours: bool = False


def recognize(content: Mapping[Any, Any], source: str) -> Weights:
    """Find out whose weights these are and rename them.

    Args:
        content: what the file holds.
        source: its path or name, for messages.

    Raises:
        UserError: nobody's whose names are known, or weights that no backbone here can use.
    """
    if CHECKPOINT_KEY in content:
        return _own(content, source)
    state, others = _tensors(content)
    if content.get("__author__") == "Caffe2" or any(_CAFFE2_NAME.fullmatch(key) for key in state):
        raise UserError(
            f"weights={source} is one of Caffe2's (MSRA) models: they take BGR images, not divided by the deviation, "
            "and have the stride in another convolution: take torchvision's instead, e.g. weights=torchvision/resnet50"
        )
    if any(key.startswith("sem_seg_head.") for key in state):
        kind, (renamed, leftovers) = "PEM authors", translate_official(state)
    elif any(_OWN_NAME.match(key) for key in state):
        kind, renamed, leftovers = "PEM-Lightning", state, []
    elif any(_DETECTRON2_NAME.match(key) for key in state):
        kind, (renamed, leftovers) = "detectron2 ResNet", _detectron2(state)
    elif "features.0.conv.weight" in state:
        kind, (renamed, leftovers) = "STDC authors", _backbone(state, re.compile(r"features\."))
    elif any(_RESNET_NAME.match(key) for key in state):
        kind, (renamed, leftovers) = "torchvision or timm ResNet", _backbone(state, _RESNET_NAME)
    else:
        names = ", ".join([*state, *others][:3]) or "nothing"
        raise UserError(
            f"weights={source} is of no known kind (it holds {names}, ...): docs/training.md says what is accepted"
        )
    return Weights(source, kind, renamed, leftovers + others, ours=kind == "PEM-Lightning")


def _own(content: Mapping[Any, Any], source: str) -> Weights:
    try:
        checkpoint = parse_checkpoint(Path(source), content)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"weights={source} lacks what train.py writes into a checkpoint: give another") from error
    kind = f"PEM-Lightning, step {checkpoint.step} on {checkpoint.info.name}"
    return Weights(source, kind, checkpoint.network, [], tuple(checkpoint.info.class_names), ours=True)


def _tensors(content: Mapping[Any, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, of whatever they are wrapped in, and the names of what is none."""
    for wrapping in ("model", "state_dict", "blobs"):
        if isinstance(content.get(wrapping), Mapping):
            content = content[wrapping]
    values = {str(key): as_tensor(value) for key, value in content.items()}
    tensors = {key: value for key, value in values.items() if value is not None}
    others = [key for key, value in values.items() if value is None and not key.startswith("__")]
    if tensors and all(key.startswith("module.") for key in tensors):  # of nn.DataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    for key in [key for key, value in tensors.items() if key.endswith("num_batches_tracked") and value.numel() == 1]:
        tensors[key] = tensors[key].reshape(())  # some files have it as a vector
    return tensors, others


def _detectron2(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Detectron2's names of a backbone alone are those of the PEM authors' without the prefix."""
    renamed = {key: rename_official_key(f"backbone.{key}") for key in state}
    return {ours: state[k] for k, ours in renamed.items() if ours}, [k for k, ours in renamed.items() if not ours]


def _backbone(state: Mapping[str, Tensor], claimed: re.Pattern[str]) -> tuple[dict[str, Tensor], list[str]]:
    """Names that are ours as they are."""
    renamed = {f"backbone.{key}": value for key, value in state.items() if claimed.match(key)}
    return renamed, [key for key in state if not claimed.match(key)]
