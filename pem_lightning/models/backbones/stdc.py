"""Short-Term Dense Concatenate network (Fan et al., CVPR 2021, arXiv 2104.13188).

Parameter names are those of the published checkpoints (`features.*`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.layers import Backbone, ConvBNReLU, NormFactory


class STDCBlock(nn.Module):
    """A chain of four convolutions of shrinking width whose outputs are concatenated (figure 3).

    With stride 2, average pooling halves the first output, and a depthwise convolution the rest of the chain.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        half, quarter, eighth = out_channels // 2, out_channels // 4, out_channels // 8
        widths = ((in_channels, half, 1), (half, quarter, 3), (quarter, eighth, 3), (eighth, eighth, 3))
        self.conv_list = nn.ModuleList(ConvBNReLU(c_in, c_out, k, norm=norm) for c_in, c_out, k in widths)
        self.avd_layer: nn.Module = nn.Identity()
        self.skip: nn.Module = nn.Identity()
        if stride == 2:
            self.avd_layer = nn.Sequential(nn.Conv2d(half, half, 3, 2, 1, groups=half, bias=False), norm(half))
            self.skip = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H_out W_out"]:
        """Concatenate the chain's outputs, the widest first."""
        first, *rest = self.conv_list
        x = first(x)
        outputs = [self.skip(x)]
        x = self.avd_layer(x)
        for conv in rest:
            x = conv(x)
            outputs.append(x)
        return torch.cat(outputs, dim=1)


class STDC(Backbone):
    """STDC1 (blocks per stage 2, 2, 2) or STDC2 (4, 5, 3) without its classification head."""

    def __init__(self, blocks: Sequence[int], norm: NormFactory = nn.BatchNorm2d) -> None:
        super().__init__()
        self.channels = (64, 256, 512, 1024)
        features: list[nn.Module] = [ConvBNReLU(3, 32, 3, 2, norm), ConvBNReLU(32, 64, 3, 2, norm)]
        for count, c_in, c_out in zip(blocks, self.channels[:-1], self.channels[1:], strict=True):
            features.append(STDCBlock(c_in, c_out, 2, norm))
            features.extend(STDCBlock(c_out, c_out, 1, norm) for _ in range(count - 1))
        self.features = nn.Sequential(*features)
        # The two convolutions of the stem reach stride 4; then every stage doubles the stride.
        self._stage_ends = frozenset(accumulate(blocks, initial=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features; see `Backbone`."""
        x, outputs = images, []
        for i, block in enumerate(self.features):
            x = block(x)
            if i in self._stage_ends:
                outputs.append(x)
        return outputs
