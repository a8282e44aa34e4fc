"""What one of our checkpoints holds, and how it is read.

It is Lightning's file with one entry more:

    state_dict            weights, as "network.<name>"; averaged ones where the training averages
    current_model_state   then the last step's own weights
    global_step           how long it was trained
    optimizer_states, lr_schedulers, loops, callbacks    what resuming needs besides
    pem_lightning         config (the composed experiment), overrides (of the command line), dataset_info (the classes)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pem_lightning.checkpoints.safe_load import CHECKPOINT_KEY, is_safetensors, read_safetensors
from pem_lightning.deploy.sessions import Session, is_exported, open_session
from pem_lightning.types import DatasetInfo, UserError

_NETWORK_PREFIX = "network."


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

    Only plain data is unpickled, so a foreign file can do no harm.

    Raises:
        UserError: the file is missing, damaged, or not ours.
    """
    path = Path(path)
    if is_exported(path):
        session = open_session(path)
        ours = session.metadata
        return Checkpoint(path, ours.step, ours.config, ours.overrides, ours.dataset_info, {}, None, False, session)
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist: train.py writes them to outputs/<experiment>/checkpoints")
    try:
        if is_safetensors(path):
            return parse_checkpoint(path, read_safetensors(path))
        return parse_checkpoint(path, torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        raise UserError(f"{path} is damaged or was not written by train.py: give one of its .ckpt files") from error


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


def slim_content(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint's content without what resuming needs: the network (averaged, if it is), classes, configuration."""
    ours = {"config": checkpoint.config, "overrides": checkpoint.overrides, "dataset_info": checkpoint.info.to_dict()}
    state = {f"{_NETWORK_PREFIX}{name}": value.clone() for name, value in checkpoint.network.items()}
    return {"state_dict": state, "global_step": checkpoint.step, CHECKPOINT_KEY: ours}


def _network(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(_NETWORK_PREFIX): v for k, v in state.items() if k.startswith(_NETWORK_PREFIX)}


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
