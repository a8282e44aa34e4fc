"""A checkpoint of a few thousand weights, whose export takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from pem_lightning.checkpoints import Checkpoint
from pem_lightning.data.cityscapes import CITYSCAPES
from tests.models.randomize import randomize

NETWORK = {
    "_target_": "pem_lightning.models.pem.build_pem",
    "backbone": {"_target_": "tests.models.randomize.TinyBackbone"},
    "num_layers": 1,
    "channels": 32,
    "hidden_channels": 48,
    "pyramid_channels": 32,
    "mask_channels": 16,
    "num_queries": 9,
}


def tiny_checkpoint(folder: Path, **network: Any) -> Checkpoint:
    """As if read from a file; `network` are arguments of `build_pem`."""
    config = {
        "network": {**NETWORK, **network},
        "task": {"name": "panoptic", "inference": {"object_mask_threshold": 0.2, "overlap_threshold": 0.5}},
        "recipe": {"eval_transform": {"shortest_edge": None}},
    }
    torch.manual_seed(0)
    built = randomize(instantiate(config["network"], num_classes=CITYSCAPES.num_classes))
    with torch.no_grad():  # sure of something
        built.transformer_decoder.class_head.weight.mul_(8)
    path = folder / "tiny.ckpt"
    path.write_bytes(b"weights")
    return Checkpoint(path, 7, config, [], CITYSCAPES, built.state_dict())
