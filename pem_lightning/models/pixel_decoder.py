"""PEM's pixel decoder (section 3.3): a feature pyramid with context-based self-modulation (CSM) at every level.

Every level but the finest passes a modulated deformable convolution before it is upsampled into the next. The finest
makes the mask features; `LevelSum` is another way to them, which learns faster from few images.

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
from pem_lightning.types import UserError


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
    """A deformable convolution (an ordinary one in an ablation), then a transposed one that doubles the size.

    With `upsample=False` there is nothing to be upsampled into, and the aligned features are returned twice.
    """

    fusable = (("deform", "deform_norm"), ("upsample", "upsample_norm"))

    def __init__(self, channels: int, kernel: str = "auto", *, deformable: bool = True, upsample: bool = True) -> None:
        super().__init__()
        self.deform: nn.Module
        if deformable:
            self.deform = DeformableConv(channels, channels, kernel)
        else:
            self.deform = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(self.deform.weight, mode="fan_out", nonlinearity="relu")
        self.deform_norm = nn.BatchNorm2d(channels)
        self.upsample: nn.Module = nn.Identity()
        self.upsample_norm: nn.Module = nn.Identity()
        if not upsample:
            return
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
        if isinstance(self.upsample, nn.Identity):
            return x, x
        return x, F.relu(self.upsample_norm(self.upsample(x)), inplace=True)


class LevelSum(nn.Module):
    """Mask features straight from the backbone: all its levels, projected, brought to the finest one's size and summed.

    The concatenation of all levels and the projection of SegFormer's decoder (Xie et al., NeurIPS 2021), in one step.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList()
        for channels in in_channels:
            conv = nn.Conv2d(channels, out_channels, 1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            self.projections.append(nn.Sequential(conv, nn.BatchNorm2d(out_channels)))

    def forward(self, features: Sequence[Float[Tensor, "B _ _ _"]]) -> Float[Tensor, "B C H W"]:
        """Sum the levels, the finest one first, and cut off what is negative."""
        finest, *coarser = (project(x) for project, x in zip(self.projections, features, strict=True))
        for i, level in enumerate(coarser, 1):
            finest = finest + F.interpolate(level, scale_factor=2.0**i, mode="bilinear", align_corners=False)
        return F.relu(finest, inplace=True)


class PixelDecoder(nn.Module):
    """Backbone features -> features for the masks (stride 4) and for the transformer decoder (32, 16, 8).

    Args:
        csm: False for the ablation without CSM; the coarsest level still gets the global context.
        deformable: False for the ablation with ordinary convolutions.
        mask_features: "pyramid", of its finest level, as in the paper; or "levels", of the backbone's, see `LevelSum`.

    Raises:
        UserError: `mask_features` is neither.
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
        mask_features: str = "pyramid",
    ) -> None:
        super().__init__()
        if mask_features not in ("pyramid", "levels"):
            raise UserError(f"mask_features={mask_features}: choose pyramid or levels")
        finest = mask_features == "pyramid"  # whether the pyramid reaches down to stride 4
        of_pyramid = in_channels if finest else in_channels[1:]
        # All lists run from the coarsest level to the finest, the order of computation.
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, 1) for c in reversed(of_pyramid))
        self.global_context = ConvBNReLU(in_channels[-1], channels, 1)
        self.csm = nn.ModuleList(ContextSelfModulation(channels) if csm else nn.Identity() for _ in of_pyramid)
        self.upsampling = nn.ModuleList(
            DeformableUpsampling(channels, kernel, deformable=deformable, upsample=finest or stride > 8)
            for stride in (32, 16, 8)
        )
        self.mask_projection: nn.Module = (
            ConvBNReLU(channels, mask_channels, 1) if finest else LevelSum(in_channels, mask_channels)
        )

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
        if isinstance(self.mask_projection, LevelSum):
            return self.mask_projection(features), levels
        return self.mask_projection(self._modulate(-1, coarse_to_fine[-1], context)), levels

    def _modulate(
        self, i: int, feature: Float[Tensor, "B C_in H W"], context: Float[Tensor, "B C _ _"]
    ) -> Float[Tensor, "B C H W"]:
        x, csm = self.laterals[i](feature), self.csm[i]
        # csm(x) is a new tensor, to which may be added in place; an Identity hands on the ReLU's output, which its
        # backward pass needs.
        return x + context if isinstance(csm, nn.Identity) else csm(x).add_(context)
