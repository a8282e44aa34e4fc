"""The interface of every backbone (a file of its own, because the backbones and their list import it)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.types import UserError


class Backbone(nn.Module, ABC):
    """A feature extractor."""

    channels: tuple[int, ...]  # at strides 4, 8, 16 and 32

    @abstractmethod
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _ _ _"]]:
        """Extract features at strides 4, 8, 16 and 32 from normalised images, whose sides are multiples of 32."""

    def load_pretrained(self, source: bool | str = True) -> None:
        """Load the weights of the backbone's library (True) or of a file.

        Raises:
            UserError: there are none for this backbone.
        """
        raise UserError("backbone.pretrained is for backbone=timm: leave it out")
