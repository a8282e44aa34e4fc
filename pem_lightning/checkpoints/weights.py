"""Starting a network from weights of one's own or of others', and converting them."""

from __future__ import annotations

import io
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from pem_lightning.checkpoints.download import DOWNLOADS, download, unknown_name
from pem_lightning.checkpoints.foreign import Weights, recognize
from pem_lightning.checkpoints.official import describe_network, guess_backbone
from pem_lightning.checkpoints.reading import read_content
from pem_lightning.checkpoints.report import CLASS_HEAD, LoadReport, compare
from pem_lightning.errors import UserError
from pem_lightning.files import write_file
from pem_lightning.networks.backbones import build_backbone
from pem_lightning.types import DatasetInfo


def read_weights(source: str | Path) -> Weights:
    """Read weights of whatever kind is accepted (see docs/training.md), by our names.

    Args:
        source: a file, or one of the names in `DOWNLOADS`.

    Raises:
        UserError: they do not exist, cannot be had, are damaged, dangerous or of no known kind.
    """
    path = Path(source)
    if path.is_file():
        return recognize(read_content(path), str(source))
    if str(source) in DOWNLOADS:
        return recognize(download(str(source)), str(source))
    if re.fullmatch(r"[\w-]+/[\w-]+", str(source)):  # no suffix: meant as a name
        raise unknown_name(str(source))
    raise UserError(f"weights={source} does not exist: give a file or one of the names {', '.join(DOWNLOADS)}")


def load_weights(network: nn.Module, source: str | Path, info: DatasetInfo | None = None) -> LoadReport:
    """Start a freshly made network from published weights or a checkpoint; what they lack stays as it is.

    Args:
        network: `PEM` with random weights.
        source: a file, or one of the names in `DOWNLOADS`.
        info: the classes it is for. A checkpoint of ours with other ones leaves the class head random.

    Returns:
        What was taken over and what was not; `show_report` prints it.

    Raises:
        UserError: see `read_weights`; or the backbone is not covered completely, and the network is left as it was.
    """
    weights = read_weights(source)
    state = network.state_dict()
    report = compare(state, weights, None if info is None else info.class_names)
    report.check_backbone()
    with torch.no_grad():
        for name in report.loaded:
            state[name].copy_(weights.state[name])
    return report


def convert_weights(source: str | Path, target: Path, backbone: str | None = None) -> LoadReport:
    """Write weights under our names as a plain file of tensors that `load_weights` reads.

    Args:
        source: a file, or one of the names in `DOWNLOADS`.
        target: a file of torch.save is written there. If the backbone is not covered, none is.
        backbone: what they are meant for; None takes the one that they look like.

    Returns:
        What was written (`loaded`) and what was not. `check_backbone` decides whether it was.

    Raises:
        UserError: see `read_weights`; or the backbone is unknown, or the file cannot be written.
    """
    weights = read_weights(source)
    report = compare(_expected(weights, backbone), weights)
    if not report.gaps():
        buffer = io.BytesIO()
        torch.save({name: weights.state[name].clone() for name in report.loaded}, buffer)
        write_file(target, buffer.getvalue())
    return report


def _expected(weights: Weights, backbone: str | None) -> dict[str, Tensor]:
    """The names and shapes that weights should have: PEM's if there are some of its decoder, else the backbone's."""
    name = backbone or guess_backbone(weights.state)
    if f"{CLASS_HEAD}weight" in weights.state and not weights.ours:
        return describe_network(weights.state, name)
    expected = dict(weights.state) if weights.ours else {}
    if name is None and not expected:
        raise UserError(f"weights={weights.source} ({weights.kind}) are those of no backbone here: say --backbone NAME")
    if name is not None:
        with torch.device("meta"):
            own = build_backbone(name).state_dict()
        expected = {key: value for key, value in expected.items() if not key.startswith("backbone.")}
        expected |= {f"backbone.{key}": value for key, value in own.items()}
    return expected
