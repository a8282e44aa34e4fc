"""Backbones behind one interface: an image in, four feature maps at strides 4, 8, 16 and 32 out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from pem_lightning.models.backbones.efficientnet_lite import EfficientNetLite
from pem_lightning.models.backbones.resnet import ResNet
from pem_lightning.models.backbones.stdc import STDC
from pem_lightning.models.layers import Backbone, FrozenBatchNorm2d, NormFactory
from pem_lightning.types import UserError

NORMS: dict[str, NormFactory] = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}

BACKBONES: dict[str, Callable[..., Backbone]] = {
    "resnet18": partial(ResNet, 18),
    "resnet34": partial(ResNet, 34),
    "resnet50": partial(ResNet, 50),
    "resnet101": partial(ResNet, 101),
    "stdc1": partial(STDC, (2, 2, 2)),
    "stdc2": partial(STDC, (4, 5, 3)),
    "efficientnet_lite0": partial(EfficientNetLite, 0),
    "efficientnet_lite1": partial(EfficientNetLite, 1),
    "efficientnet_lite2": partial(EfficientNetLite, 2),
}


def build_backbone(name: str, norm: str = "batch") -> Backbone:
    """Build one of `BACKBONES` with random weights and one of `NORMS`; an unknown name raises `UserError`."""
    if name not in BACKBONES:
        raise UserError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    if norm not in NORMS:
        raise UserError(f"unknown backbone norm {norm!r}: choose one of {', '.join(NORMS)}")
    return BACKBONES[name](norm=NORMS[norm])
