"""ResNet (He et al., CVPR 2016) with torchvision's parameter names, so that its weights load as they are.

The stride sits in the 3x3 convolution of a bottleneck ("ResNet v1.5"), as in the weights PEM starts from.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.layers import Backbone, NormFactory


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (depths 18 and 34)."""

    expansion = 1
    fusable = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, in_channels: int, width: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = norm(width)
        self.downsample = _shortcut(in_channels, width, stride, norm)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Transform."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)).add_(self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up and a shortcut (depths 50 and 101)."""

    expansion = 4
    fusable = (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3"))

    def __init__(self, in_channels: int, width: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Transform."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)).add_(self.downsample(x)), inplace=True)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> nn.Module:
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


STAGES: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}
"""Depth -> block, and blocks per stage."""


class ResNet(Backbone):
    """ResNet-18, -34, -50 or -101 without its classification head."""

    fusable = (("conv1", "bn1"),)

    def __init__(self, depth: int = 50, norm: NormFactory = nn.BatchNorm2d) -> None:
        super().__init__()
        block, repeats = STAGES[depth]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = norm(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = tuple(width * block.expansion for width in (64, 128, 256, 512))

        def stage(in_channels: int, width: int, repeat: int, stride: int) -> nn.Sequential:
            rest = (block(width * block.expansion, width, 1, norm) for _ in range(repeat - 1))
            return nn.Sequential(block(in_channels, width, stride, norm), *rest)

        self.layer1 = stage(64, 64, repeats[0], 1)
        self.layer2 = stage(self.channels[0], 128, repeats[1], 2)
        self.layer3 = stage(self.channels[1], 256, repeats[2], 2)
        self.layer4 = stage(self.channels[2], 512, repeats[3], 2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features; see `Backbone`."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return features
