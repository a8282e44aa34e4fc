"""The networks that are compared: with random weights that behave like trained ones, or from a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import nn

from pem_lightning.checkpoints import load_network, read_checkpoint
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.pem import PEM, build_pem
from pem_lightning.types import UserError

CITYSCAPES_CLASSES = 19
CITYSCAPES_THINGS = frozenset(range(11, 19))
"""As in `data.cityscapes.CITYSCAPES`, which is not imported, because the benchmark needs no data set."""

RANDOM_OVERLAP_THRESHOLD = 0.0
"""Masks of random networks lie across one another; with a usual threshold none would be left in the panoptic map."""


@dataclass(frozen=True)
class Weights:
    """A network in evaluation mode and how its predictions are meant.

    Attributes:
        backbone: its name.
        network: on the CPU, in float32.
        thing_classes: the countable classes.
        inference: settings of `TaskInference`.
        source: where the weights are from.
    """

    backbone: str
    network: PEM
    thing_classes: frozenset[int] = CITYSCAPES_THINGS
    inference: dict[str, Any] = field(default_factory=dict)
    source: str = "random"

    def to(self, device: torch.device) -> Weights:
        """Move the network."""
        self.network.to(device)
        return self


def random_weights(backbone: str, seed: int = 0) -> Weights:
    """Build the paper's network for Cityscapes with random weights that behave like trained ones.

    Raises:
        UserError: the backbone is unknown.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = imitate_training(build_pem(backbone, num_classes=CITYSCAPES_CLASSES))
    return Weights(backbone, network, inference={"overlap_threshold": RANDOM_OVERLAP_THRESHOLD})


def imitate_training(network: PEM) -> PEM:
    """Make freshly initialised weights behave like trained ones, in place; leaves the network in evaluation mode.

    As it is, it would be no fair subject: deformable convolutions would sample the regular grid, and without statistics
    the batch normalisations would let activations grow out of all proportion. So offsets are given random weights (they
    come to about a pixel), and statistics are taken from noise.
    """
    for module in network.modules():
        if isinstance(module, DeformableConv):
            nn.init.kaiming_uniform_(module.offset.weight, a=5**0.5)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 128, 256))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return network.eval()


def checkpoint_weights(path: str | Path) -> Weights:
    """Read a checkpoint that train.py wrote.

    Raises:
        UserError: the file is missing, damaged or not ours, or its network is not built by `build_pem`.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.config["network"]
    if settings.get("_target_") != "pem_lightning.build_pem":
        raise UserError(f"{path} holds a network of its own kind: the benchmark takes those of conf/network/pem.yaml")
    network = instantiate(settings, num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    backbone = settings["backbone"]
    return Weights(
        backbone if isinstance(backbone, str) else backbone["name"],
        network.eval(),
        checkpoint.info.thing_classes,
        dict(checkpoint.config["task"]["inference"]),
        f"{Path(path).name}, step {checkpoint.step} on {checkpoint.info.name}",
    )
