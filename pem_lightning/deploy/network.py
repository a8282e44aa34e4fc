"""An exported file with the network's interface, so that evaluation, prediction, tiles and views take it unchanged."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pem_lightning.deploy.sessions import Logits, Session, open_session
from pem_lightning.models.layers import IMAGE_MEAN, IMAGE_STD
from pem_lightning.types import Predictions, UserError

Run = Callable[[np.ndarray], Logits]
"""RGB images, uint8 [B, H, W, 3] -> class logits and mask logits, float32."""


class UInt8Network(nn.Module):
    """Whatever takes uint8 images, as a network that takes normalised ones.

    Normalisation is undone and rounded. That is exact for images that were uint8; the views of test-time augmentation,
    which are resized after normalisation, are rounded to grey levels.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """As `PEM.forward`; the logits come to the images' device."""
        mean, std = torch.tensor((IMAGE_MEAN, IMAGE_STD), device=images.device)[:, :, None, None]
        pixels = (images * std + mean).round().clamp(0, 255).to(torch.uint8)
        logits = self.run(pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy())
        classes, masks = (torch.from_numpy(array).to(images.device) for array in logits)
        return Predictions(classes, masks)


class ExportedNetwork(UInt8Network):
    """The network of an exported file. Copies of it, also in other processes, open the file anew.

    Args:
        session: the open file; it is opened anew if it is to run otherwise.
        precision: "float32", or "bfloat16" for .xml.
        compile: None; anything else is refused.
        device: "cpu", "cuda", "cuda:1", ... or "auto" for the best that the runtime has.

    Raises:
        UserError: the file gives results instead of logits, or it cannot run so.
    """

    def __init__(
        self, session: Session, precision: str = "float32", compile: str | None = None, device: str = "auto"
    ) -> None:
        metadata, name = session.metadata, session.path.name
        if metadata.results is not None:
            raise UserError(
                f"{name} gives {metadata.results} maps instead of logits, which evaluation and prediction start from: "
                "export the checkpoint with results=false"
            )
        if compile is not None:
            raise UserError(f"inference.compile is for checkpoints, {name} has a runtime of its own: leave it out")
        wanted = None if device == "auto" else str(device)
        if precision != "float32" or wanted not in (None, session.device):
            session = open_session(session.path, precision=precision, device=wanted)
        super().__init__(session.run)
