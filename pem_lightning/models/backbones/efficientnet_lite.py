"""EfficientNet-Lite: EfficientNet (Tan and Le, ICML 2019) with ReLU6 and without squeeze-and-excitation, for the edge.

Parameter names are those of timm's `tf_efficientnet_lite0` to `2`. Google's weights, for which these networks are made,
want TensorFlow's "SAME" padding and images in -1 to 1.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.layers import IMAGE_MEAN, IMAGE_STD, Backbone, NormFactory

_EPSILON = 1e-3  # of TensorFlow's batch normalisation
_STEM = 32
_KERNELS = (3, 3, 5, 3, 5, 5, 3)
_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_OUTPUTS = (1, 2, 4, 6)
"""The stages that end at strides 4, 8, 16 and 32."""
_WIDTHS = (16, 24, 40, 80, 112, 192, 320)
DEPTHS = ((1, 2, 2, 3, 3, 4, 1), (1, 3, 3, 4, 4, 5, 1), (1, 3, 3, 4, 4, 5, 1))
"""Blocks per stage of Lite0, Lite1 and Lite2."""
WIDTHS = (_WIDTHS, _WIDTHS, (16, 24, 48, 88, 120, 208, 352))
"""Channels per stage of Lite0, Lite1 and Lite2."""


class SameConv2d(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's "SAME" does if the stride divides height and width.

    At stride 2 the top and left get one row and column less than the bottom and right.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel_size // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False)
        before, after = (kernel_size - stride) // 2, (kernel_size - stride + 1) // 2
        self.border = (before, after, before, after) if stride > 1 else None
        fan_out = kernel_size**2 * out_channels // groups
        nn.init.normal_(self.weight, std=math.sqrt(2 / fan_out))

    def forward(self, input: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Pad and convolve."""
        return super().forward(input if self.border is None else F.pad(input, self.border))


class SeparableBlock(nn.Module):
    """A depthwise and a 1x1 convolution: the first block."""

    fusable = (("conv_dw", "bn1"), ("conv_pw", "bn2"))

    def __init__(self, in_channels: int, out_channels: int, norm: NormFactory) -> None:
        super().__init__()
        self.conv_dw = SameConv2d(in_channels, in_channels, 3, groups=in_channels)
        self.bn1 = norm(in_channels)
        self.conv_pw = SameConv2d(in_channels, out_channels, 1)
        self.bn2 = norm(out_channels)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """Transform."""
        x = F.relu6(self.bn1(self.conv_dw(x)), inplace=True)
        return self.bn2(self.conv_pw(x))


class InvertedResidual(nn.Module):
    """1x1 up to six times the channels, depthwise, 1x1 down; a shortcut where the shape stays. As in MobileNetV2."""

    fusable = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        width = 6 * in_channels
        self.conv_pw = SameConv2d(in_channels, width, 1)
        self.bn1 = norm(width)
        self.conv_dw = SameConv2d(width, width, kernel_size, stride, groups=width)
        self.bn2 = norm(width)
        self.conv_pwl = SameConv2d(width, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Transform."""
        out = F.relu6(self.bn1(self.conv_pw(x)), inplace=True)
        out = F.relu6(self.bn2(self.conv_dw(out)), inplace=True)
        out = self.bn3(self.conv_pwl(out))
        return out.add_(x) if self.has_shortcut else out


class EfficientNetLite(Backbone):
    """EfficientNet-Lite0, 1 or 2 without its classification head."""

    fusable = (("conv_stem", "bn1"),)
    input_scale: Tensor
    input_shift: Tensor

    def __init__(self, number: int = 0, norm: NormFactory = nn.BatchNorm2d) -> None:
        super().__init__()
        norm = partial(norm, eps=_EPSILON)
        widths = WIDTHS[number]
        self.channels = tuple(widths[stage] for stage in _OUTPUTS)
        # From ImageNet's normalisation to (pixel - 127.5) / 127.5. Folded into the first convolution it would be wrong
        # at the borders, which are padded with 0.
        scale, shift = ([v / 127.5 for v in IMAGE_STD], [v / 127.5 - 1 for v in IMAGE_MEAN])
        for name, values in (("input_scale", scale), ("input_shift", shift)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.conv_stem = SameConv2d(3, _STEM, 3, 2)
        self.bn1 = norm(_STEM)
        stages = [nn.Sequential(SeparableBlock(_STEM, widths[0], norm))]
        rows = zip(widths[:-1], widths[1:], DEPTHS[number][1:], _KERNELS[1:], _STRIDES[1:], strict=True)
        for c_in, c_out, depth, kernel_size, stride in rows:
            rest = (InvertedResidual(c_out, c_out, kernel_size, 1, norm) for _ in range(depth - 1))
            stages.append(nn.Sequential(InvertedResidual(c_in, c_out, kernel_size, stride, norm), *rest))
        self.blocks = nn.Sequential(*stages)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features; see `Backbone`."""
        x = torch.addcmul(self.input_shift, images, self.input_scale)
        x = F.relu6(self.bn1(self.conv_stem(x)), inplace=True)
        features = []
        for index, stage in enumerate(self.blocks):
            x = stage(x)
            if index in _OUTPUTS:
                features.append(x)
        return features
