"""PEM's pixel decoder (section 3.3): a feature pyramid with context-based self-modulation (CSM) at every level.

Every level but the finest passes a modulated deformable convolution before it is upsampled into the next.

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
    """CSM: weigh channels by the map's own global context, x + x * w(mean(x)); w passes a sigmoid twice (authors)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1, bias=False),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Modulate."""
        weight = self.mlp(x.mean(dim=(2, 3), keepdim=True)).sigmoid().sigmoid()
        return torch.addcmul(x, x, weight)  # x * (1 + weight) would round the weight of a whole channel


class DeformableUpsampling(nn.Module):
    """A deformable convolution (an ordinary one in an ablation), then a transposed one that doubles the size."""

    fusable = (("deform", "deform_norm"), ("upsample", "upsample_norm"))

    def __init__(self, channels: int, kernel: str = "auto", *, deformable: bool = True) -> None:
        super().__init__()
        self.deform: nn.Module
        if deformable:
            self.deform = DeformableConv(channels, channels, kernel)
        else:
            self.deform = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.deform.weight, mode="fan_out", nonlinearity="relu")
        self.deform_norm = nn.BatchNorm2d(channels)
        self.upsample = nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1, bias=False)
        self.upsample_norm = nn.BatchNorm2d(channels)
        # As in the authors' code, only the weights to the first output channel start as bilinear interpolation.
        ramp = torch.tensor([0.25, 0.75, 0.75, 0.25])
        with torch.no_grad():
            self.upsample.weight[:, 0] = torch.outer(ramp, ramp)

    def forward(
        self, x: Float[Tensor, "B C H W"]
    ) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, "B C double_H double_W"]]:
        """Return the aligned features, and the same at twice the size."""
        x = F.relu(self.deform_norm(self.deform(x)), inplace=True)
        return x, F.relu(self.upsample_norm(self.upsample(x)), inplace=True)


class PixelDecoder(nn.Module):
    """Backbone features -> features for the masks (stride 4) and for the transformer decoder (32, 16, 8).

    Args:
        csm: False for the ablation without CSM; the coarsest level still gets the global context.
        deformable: False for the ablation with ordinary convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        mask_channels: int,
        kernel: str = "auto",
        *,
        csm: bool = True,
        deformable: bool = True,
    ) -> None:
        super().__init__()
        # All lists run from the coarsest level to the finest, the order of computation.
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, 1) for c in reversed(in_channels))
        self.global_context = ConvBNReLU(in_channels[-1], channels, 1)
        self.csm = nn.ModuleList(ContextSelfModulation(channels) if csm else nn.Identity() for _ in in_channels)
        of_levels = (DeformableUpsampling(channels, kernel, deformable=deformable) for _ in in_channels[1:])
        self.upsampling = nn.ModuleList(of_levels)
        self.mask_projection = ConvBNReLU(channels, mask_channels, 1)

    def forward(
        self, features: list[Float[Tensor, "B _ _ _"]]
    ) -> tuple[Float[Tensor, "B C_mask H W"], list[Float[Tensor, "B C _ _"]]]:
        """Return mask features of stride 4, never negative, and the levels of strides 32, 16 and 8."""
        coarse_to_fine = features[::-1]
        context = self.global_context(coarse_to_fine[0].mean(dim=(2, 3), keepdim=True))
        levels = []
        for i, upsampling in enumerate(self.upsampling):
            level, context = upsampling(self._modulate(i, coarse_to_fine[i], context))
            levels.append(level)
        return self.mask_projection(self._modulate(-1, coarse_to_fine[-1], context)), levels

    def _modulate(
        self, i: int, feature: Float[Tensor, "B C_in H W"], context: Float[Tensor, "B C _ _"]
    ) -> Float[Tensor, "B C H W"]:
        x, csm = self.laterals[i](feature), self.csm[i]
        # csm(x) is a new tensor, to which may be added in place; an Identity hands on the ReLU's output, which its
        # backward pass needs.
        return x + context if isinstance(csm, nn.Identity) else csm(x).add_(context)
