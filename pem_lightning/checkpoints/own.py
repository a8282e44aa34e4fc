"""Our own checkpoints, as train.py writes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pem_lightning.errors import UserError
from pem_lightning.types import DatasetInfo

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
    raw = {k.removeprefix(_NETWORK_PREFIX): v for k, v in state.items() if k.startswith(_NETWORK_PREFIX)}
    averaged = ours.get("averaged")
    return Checkpoint(
        path=path,
        step=content["global_step"],
        config=ours["config"],
        overrides=ours["overrides"],
        info=DatasetInfo.from_dict(ours["dataset_info"]),
        network=raw if averaged is None else averaged["weights"],
        raw=None if averaged is None else raw,
        resumable="optimizer_states" in content,
    )


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
