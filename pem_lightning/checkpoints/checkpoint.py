"""What one of our checkpoints holds, and how it is read.

It is Lightning's file with one entry more:

    state_dict            weights, as "network.<name>"; averaged ones where the training averages
    current_model_state   then the last step's own weights
    global_step           how long it was trained
    optimizer_states, lr_schedulers, loops, callbacks    what resuming needs besides
    pem_lightning         config (the composed experiment), overrides (of the command line), dataset_info (the classes)

A slim file has no more than state_dict, global_step and pem_lightning. One of 8 bits has large weights as int8, and as
"network.<name>.scales" what to multiply them by; whoever reads it gets float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int8, Shaped
from torch import Tensor, nn

from pem_lightning.checkpoints.safe_load import CHECKPOINT_KEY, is_safetensors, read_safetensors
from pem_lightning.deploy.sessions import Session, is_exported, open_session
from pem_lightning.types import DatasetInfo, UserError

SHIPPED = {"camvid": Path(__file__).resolve().parents[1] / "assets" / "pem_lite0_camvid.ckpt"}
"""Trained networks that come with the package: their names, which stand for a path, and their files."""

WEIGHTS = "model.safetensors"
"""The file with the network in a folder to give away, see `hub`."""

_NETWORK_PREFIX = "network."
_SCALES = ".scales"
_INT8_ABOVE = 4096
"""Weights of no more elements stay float32, as all biases and normalisations do: together a twentieth of a file."""

_PRIVATE_KEYS = frozenset(("root", "cache", "output_dir", "default_root_dir", "resume", "hydra", "logger", "callbacks"))
"""Keys of a configuration that tell of the machine and the accounts of a training, besides `_A_PATH`."""
_A_PATH = re.compile(r"""(^|[\s'"\[{,:])(~|/|\\\\|[A-Za-z]:[\\/])|\.(ckpt|pth?|pkl|tar|safetensors)\b""", re.IGNORECASE)
"""An absolute path, or a file of weights."""


class Checkpoint(NamedTuple):
    """One of our checkpoints, as far as evaluation and prediction need it.

    `network` has the weights by the network's own names, averaged ones if the training averaged them; `raw` then has
    those of the last step. `resumable` tells whether it has what a training needs to go on. An exported file has no
    weights but a `session`.
    """

    path: Path
    step: int
    config: dict[str, Any]
    overrides: list[str]
    info: DatasetInfo
    network: dict[str, Tensor]
    raw: dict[str, Tensor] | None = None
    resumable: bool = True
    session: Session | None = None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint that train.py or scripts/convert_checkpoint.py wrote, or open a file that export.py wrote.

    `path` may be a name of `SHIPPED`, unless there is a file of that name, or a folder with `WEIGHTS`. Only plain data
    is unpickled.

    Raises:
        UserError: the file is missing, damaged, or not ours.
    """
    path = shipped_file(path)
    if is_exported(path):
        session = open_session(path)
        ours = session.metadata
        return Checkpoint(path, ours.step, ours.config, ours.overrides, ours.dataset_info, {}, None, False, session)
    if not path.is_file():
        raise UserError(
            f"checkpoint {path} does not exist: train.py writes them to outputs/<experiment>/checkpoints; "
            f"networks that ship: {', '.join(SHIPPED)}"
        )
    try:
        if is_safetensors(path):
            return parse_checkpoint(path, read_safetensors(path))
        return parse_checkpoint(path, torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        raise UserError(f"{path} is damaged or was not written by train.py: give one of its .ckpt files") from error


def shipped_file(path: str | Path) -> Path:
    """The path; of a folder with `WEIGHTS` that file; of a name of `SHIPPED` its file if there is none of that name."""
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path / WEIGHTS
    return path if path.is_file() else SHIPPED.get(str(path), path)


def parse_checkpoint(path: Path, content: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint's content, of today's form or an older one."""
    content = convert_old(content)
    ours, raw = content[CHECKPOINT_KEY], content.get("current_model_state")
    return Checkpoint(
        path=path,
        step=content["global_step"],
        config=ours["config"],
        overrides=ours["overrides"],
        info=DatasetInfo.from_dict(ours["dataset_info"]),
        network=_network(content["state_dict"]),
        raw=None if raw is None else _network(raw),
        resumable="optimizer_states" in content,
    )


def slim_content(checkpoint: Checkpoint, int8: bool = False, public: bool = False) -> dict[str, Any]:
    """A checkpoint's content without what resuming needs: the network (averaged, if it is), classes, configuration.

    With `public` it is for others: with a configuration without the paths of this machine. With `int8` it is so, too,
    and has large weights in 8 bits.
    """
    config, overrides = checkpoint.config, checkpoint.overrides
    state = {f"{_NETWORK_PREFIX}{name}": value.clone() for name, value in checkpoint.network.items()}
    if int8 or public:
        config, overrides = _public(config), [o for o in overrides if _is_public(o)]
    if int8:
        for name, value in list(state.items()):
            if value.is_floating_point() and value.dim() >= 2 and value.numel() > _INT8_ABOVE:
                state[name], state[f"{name}{_SCALES}"] = _quantize(value)
    ours = {"config": config, "overrides": overrides, "dataset_info": checkpoint.info.to_dict()}
    return {"state_dict": state, "global_step": checkpoint.step, CHECKPOINT_KEY: ours}


def _network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The network's weights by its own names; those of 8 bits in float32."""
    network = {k.removeprefix(_NETWORK_PREFIX): v for k, v in state.items() if k.startswith(_NETWORK_PREFIX)}
    for name in [name for name in network if name.endswith(_SCALES)]:
        scales, weight = network.pop(name), name.removesuffix(_SCALES)
        network[weight] = _dequantize(network[weight], scales)
    return network


def _quantize(weight: Float[Tensor, "*shape"]) -> tuple[Int8[Tensor, "*shape"], BFloat16[Tensor, " blocks"]]:
    """Integers of -127 to 127, and what to multiply every block of 64 successive ones by."""
    blocks = _blocks(weight.float())
    scales = (blocks.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
    whole = (blocks / scales[:, None].float()).round().clamp(-127, 127).to(torch.int8)
    return whole.flatten()[: weight.numel()].view(weight.shape), scales


def _dequantize(whole: Int8[Tensor, "*shape"], scales: BFloat16[Tensor, " blocks"]) -> Float[Tensor, "*shape"]:
    """The inverse of `_quantize`, up to rounding."""
    blocks = _blocks(whole) * scales[:, None].float()
    return blocks.flatten()[: whole.numel()].view(whole.shape)


def _blocks(weight: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "blocks 64"]:
    """A weight's values in their order, in rows of 64; the last one is filled up with 0."""
    values = weight.flatten()
    return F.pad(values, (0, -len(values) % 64)).view(-1, 64)


def _public(node: Any) -> Any:
    """A configuration without what only this machine has."""
    if isinstance(node, Mapping):
        return {key: _public(value) for key, value in node.items() if key not in _PRIVATE_KEYS}
    if isinstance(node, list):
        return [_public(value) for value in node]
    return None if isinstance(node, str) and _A_PATH.search(node) else node


def _is_public(override: str) -> bool:
    key, _, value = override.partition("=")
    return _PRIVATE_KEYS.isdisjoint(key.lstrip("+~").split(".")) and not _A_PATH.search(value)


def load_network(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load all of a checkpoint's weights, see `check_fits`."""
    check_fits(network, checkpoint)
    network.load_state_dict(checkpoint.network, strict=True)


def refuse_exported(path: str | Path) -> None:
    """Raise a UserError where weights are wanted and the path is that of an exported file."""
    if is_exported(path):
        raise UserError(
            f"{path} is an exported file, which can be evaluated and used, but not trained, converted or exported "
            "again: give the checkpoint that it was made from"
        )


def check_fits(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Raise a UserError if names or shapes differ from the network's."""
    refuse_exported(checkpoint.path)
    wanted, given = (
        {name: list(value.shape) for name, value in state.items()}
        for state in (network.state_dict(), checkpoint.network)
    )
    if wrong := [name for name in {**wanted, **given} if wanted.get(name) != given.get(name)]:
        shapes = f"{given.get(wrong[0], 'missing')} instead of {wanted.get(wrong[0], 'nothing')}"
        raise UserError(
            f"{checkpoint.path} does not fit the network ({wrong[0]} is {shapes}; {len(wrong)} differences): "
            "use the backbone, network and data set it was trained with"
        )


# Checkpoints of older versions. Extend these tables when a key, a choice or a module that `_target_` names is renamed.

_RENAMED_KEYS = {
    "recipe.batch_size": "recipe.global_batch_size",
    "recipe.max_per_device": "recipe.micro_batch_size",
}
"""Config keys within a group: old -> new."""

_RENAMED_CHOICES = {
    "recipe=cityscapes_panoptic": "recipe=cityscapes",
    "recipe=coco_panoptic_panoptic": "recipe=custom",
    "recipe=synthetic_panoptic": "recipe=synthetic",
}
"""Overrides that choose from a group: old -> new."""

_RENAMED_TARGETS = {
    "pem_lightning.networks.": "pem_lightning.models.",
    "pem_lightning.optim.": "pem_lightning.training.optim.",
}
"""Beginnings of dotted names in `_target_`: old -> new. Those of loggers and callbacks are never used again."""


def convert_old(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bring the content of an older version's checkpoint into today's form; today's stays as it is."""
    ours = dict(content[CHECKPOINT_KEY])
    info = ours["dataset_info"]
    classes = [{"category_id" if key == "official_id" else key: v for key, v in c.items()} for c in info["classes"]]
    ours["dataset_info"] = {**info, "classes": classes}
    ours["config"] = config = _convert_targets(ours["config"])
    for old, new in _RENAMED_KEYS.items():
        group, key = old.split(".")
        if key in config.get(group, {}):
            config[group][new.split(".")[1]] = config[group].pop(key)
    ours["overrides"] = [_convert_override(override) for override in ours["overrides"]]
    converted = {**content, CHECKPOINT_KEY: ours}
    if averaged := ours.pop("averaged", None):
        converted["current_model_state"] = content["state_dict"]
        converted["state_dict"] = {f"{_NETWORK_PREFIX}{name}": value for name, value in averaged["weights"].items()}
    return converted


def _convert_override(override: str) -> str:
    if override in _RENAMED_CHOICES:
        return _RENAMED_CHOICES[override]
    key, equals, value = override.partition("=")
    name = key.lstrip("+~")
    return f"{key.removesuffix(name)}{_RENAMED_KEYS.get(name, name)}{equals}{value}"


def _convert_targets(node: Any) -> Any:
    if isinstance(node, list):
        return [_convert_targets(value) for value in node]
    if not isinstance(node, dict):
        return node
    converted = {key: _convert_targets(value) for key, value in node.items()}
    for old, new in _RENAMED_TARGETS.items():
        if str(converted.get("_target_")).startswith(old):
            converted["_target_"] = new + converted["_target_"].removeprefix(old)
    return converted
