"""PEM: Prototype-based Efficient MaskFormer (Cavagnero, Rosi et al., CVPR 2024, arXiv 2402.19422)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.models.backbones import Backbone, build_backbone
from pem_lightning.models.mask2former_pixel_decoder import MSDeformPixelDecoder
from pem_lightning.models.pixel_decoder import PixelDecoder
from pem_lightning.models.transformer_decoder import TransformerDecoder
from pem_lightning.types import Predictions, UserError

SIZE_DIVISOR = 32  # the coarsest stride


def padded_size(height: int, width: int) -> tuple[int, int]:
    """Round both sides up to a multiple of 32."""
    return -(-height // SIZE_DIVISOR) * SIZE_DIVISOR, -(-width // SIZE_DIVISOR) * SIZE_DIVISOR


class PEM(nn.Module):
    """Backbone -> pixel decoder -> transformer decoder."""

    def __init__(
        self,
        backbone: Backbone,
        pixel_decoder: PixelDecoder | MSDeformPixelDecoder,
        transformer_decoder: TransformerDecoder,
    ) -> None:
        super().__init__()
        self.backbone, self.pixel_decoder, self.transformer_decoder = backbone, pixel_decoder, transformer_decoder

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """Predict classes and masks, the masks at a quarter of the padded size, from normalised images of any size."""
        height, width = images.shape[-2:]
        full_height, full_width = padded_size(height, width)
        if (height, width) != (full_height, full_width):
            images = F.pad(images, (0, full_width - width, 0, full_height - height))
        mask_features, levels = self.pixel_decoder(self.backbone(images))
        return self.transformer_decoder(mask_features, levels)


def build_pem(
    backbone: str | Backbone = "resnet50",
    *,
    num_classes: int,
    num_queries: int = 100,
    backbone_norm: str = "batch",
    kernel: str = "auto",
    pixel_decoder: str = "pem",
    pyramid_channels: int = 128,
    mask_channels: int = 256,
    csm: bool = True,
    deformable: bool = True,
    mask_features: str = "pyramid",
    **decoder: Any,
) -> PEM:
    """Build PEM with random weights; the defaults are the paper's sizes.

    Args:
        backbone: resnet18, resnet34, resnet50, resnet101, stdc1, stdc2, efficientnet_lite0, 1 or 2, or a module.
        num_classes: K, without "no object".
        num_queries: the largest number of segments of an image.
        backbone_norm: "batch" or "frozen", for a backbone given by name.
        kernel: of the deformable operators: "auto", "torch", "mmcv", for convolutions also "torchvision".
        pixel_decoder: "pem", or "msdeform" for Mask2Former's.
        csm, deformable, mask_features: of PEM's pixel decoder, see `PixelDecoder`.
        decoder: further arguments of `TransformerDecoder`, such as `num_layers`.

    Raises:
        UserError: an unknown or impossible choice, or a kernel that is not installed.
    """
    if isinstance(backbone, str):
        backbone = build_backbone(backbone, backbone_norm)
    sizes = (backbone.channels, pyramid_channels, mask_channels, kernel)
    if pixel_decoder == "msdeform":
        if not (csm and deformable):
            raise UserError("csm=false and deformable=false leave parts out of PEM's pixel decoder: msdeform has none")
        if mask_features != "pyramid":
            raise UserError(f"mask_features={mask_features} is of PEM's pixel decoder: msdeform has pyramid only")
        pixels: PixelDecoder | MSDeformPixelDecoder = MSDeformPixelDecoder(*sizes)
    elif pixel_decoder == "pem":
        pixels = PixelDecoder(*sizes, csm=csm, deformable=deformable, mask_features=mask_features)
    else:
        raise UserError(f"pixel_decoder={pixel_decoder}: choose pem or msdeform")
    transformer_decoder = TransformerDecoder(
        pyramid_channels, mask_channels, num_classes=num_classes, num_queries=num_queries, **decoder
    )
    return PEM(backbone, pixels, transformer_decoder)
