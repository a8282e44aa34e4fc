"""PEM's efficient multi-scale pixel decoder (section 3.3 of the paper).

A convolutional feature pyramid in which every level passes context-based self-modulation (CSM), and every level but the
finest a modulated deformable convolution before it is upsampled into the next.

Legend: B batch, C channels, H W spatial.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.models.layers import ConvBNReLU


class ContextSelfModulation(nn.Module):
    """CSM: reweigh channels by the map's own global context, x + x * w(mean(x)).

    The weight passes a sigmoid twice, as in the authors' code; it thus lies between 0.5 and 0.73.
    """

    def __init__(self, channels: int, reduction: int = 2) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // reduction, 1, bias=False),
            nn.BatchNorm2d(channels // reduction),
            nn.ReLU(),
            nn.Conv2d(channels // reduction, channels, 1, bias=False),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Modulate."""
        weight = self.mlp(x.mean(dim=(2, 3), keepdim=True)).sigmoid().sigmoid()
        return torch.addcmul(x, x, weight)  # x * (1 + weight) would round every weight, a whole channel at once


class DeformableUpsampling(nn.Module):
    """A deformable convolution that aligns features, then a transposed convolution that doubles the size.

    Args:
        channels: of input and outputs.
        kernel: of the deformable convolution.
        deformable: False for the ablation with an ordinary 3x3 convolution in its place.
    """

    foldable = (("deform", "deform_norm"), ("upsample", "upsample_norm"))

    def __init__(self, channels: int, kernel: str = "auto", *, deformable: bool = True) -> None:
        super().__init__()
        self.deform = DeformableConv(channels, channels, kernel) if deformable else _plain_conv(channels)
        self.deform_norm = nn.BatchNorm2d(channels)
        self.upsample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
        self.upsample_norm = nn.BatchNorm2d(channels)
        # The authors give the weights from every input to the first output channel a bilinear start and leave the rest.
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.upsample.weight[:, 0] = torch.outer(ramp, ramp)

    def forward(
        self, x: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C double_H double_W"]]:
        """Return the aligned features, and the same at twice the size."""
        x = F.relu(self.deform_norm(self.deform(x)), inplace=True)
        return x, F.relu(self.upsample_norm(self.upsample(x)), inplace=True)


def _plain_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as the deformable one's
    return conv


class PixelDecoder(nn.Module):
    """Backbone features -> features for the masks (stride 4) and for the transformer decoder (32, 16, 8).

    Args:
        in_channels: of the backbone's features at strides 4, 8, 16 and 32.
        channels: of the pyramid.
        mask_channels: of the mask features.
        kernel: of the deformable convolutions, see `deformable_conv.get_kernel`.
        csm: False for the ablation without context-based self-modulation. The coarsest level still gets the global
            context; what goes is the modulation of every level by its own.
        deformable: False for the ablation with ordinary 3x3 convolutions. With neither it is a plain feature pyramid.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int = 128,
        mask_channels: int = 256,
        kernel: str = "auto",
        *,
        csm: bool = True,
        deformable: bool = True,
    ) -> None:
        super().__init__()
        self.channels = channels
        # All lists run from the coarsest level to the finest, the order of computation.
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, 1) for c in reversed(in_channels))
        self.global_context = ConvBNReLU(in_channels[-1], channels, 1)
        self.csm = nn.ModuleList(ContextSelfModulation(channels) if csm else nn.Identity() for _ in in_channels)
        self.upsampling = nn.ModuleList(
            DeformableUpsampling(channels, kernel, deformable=deformable) for _ in in_channels[1:]
        )
        self.mask_projection = ConvBNReLU(channels, mask_channels, 1)

    def forward(
        self, features: list[Float[Tensor, "B _ _ _"]]
    ) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
        """Decode.

        Args:
            features: the backbone's, of strides 4, 8, 16 and 32.

        Returns:
            Mask features of stride 4, never negative, and the pyramid's levels of strides 32, 16 and 8.
        """
        coarse_to_fine = features[::-1]
        context = self.global_context(coarse_to_fine[0].mean(dim=(2, 3), keepdim=True))
        levels = []
        for feature, lateral, csm, upsampling in zip(
            coarse_to_fine, self.laterals, self.csm, self.upsampling, strict=False
        ):
            level, context = upsampling(_modulate(csm, lateral(feature), context))
            levels.append(level)
        finest = _modulate(self.csm[-1], self.laterals[-1](coarse_to_fine[-1]), context)
        return self.mask_projection(finest), levels


def _modulate(
    csm: nn.Module, x: Float[Tensor, "B C H W"], context: Float[Tensor, "B C _ _"]
) -> Float[Tensor, "B C H W"]:
    # The modulated map is new and may be added to in place; without CSM it is a ReLU's output, which the ReLU's
    # gradient needs.
    return x + context if isinstance(csm, nn.Identity) else csm(x).add_(context)
