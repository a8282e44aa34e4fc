"""From a model and a photograph to a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from pem_lightning.inference.images import read_image
from pem_lightning.inference.results import SegmentedImage
from pem_lightning.inference.task import TaskInference
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.preprocess import normalize
from pem_lightning.types import VOID_ID, DatasetInfo, Sample


class Predictor:
    """Segments one image after the other.

    Args:
        model: takes normalised images [B, 3, H, W] of any size and returns `Predictions`. Is put into evaluation
            mode and moved to `device`.
        info: the classes it knows.
        inference: the task and its thresholds.
        resize: what evaluation does to an image before the model sees it, such as `EvalTransform(640, 2560)`; None
            leaves it as it is. Results are always at the image's own size.
        device: where the model runs. Results are on the CPU.
        scales: see `TestTimeAugmentation`.
        flip: likewise.
    """

    def __init__(
        self,
        model: nn.Module,
        info: DatasetInfo,
        inference: TaskInference,
        *,
        resize: Callable[[Sample], Sample] | None = None,
        device: str | torch.device = "cpu",
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.info = info
        self.inference = inference
        self.augmentation = TestTimeAugmentation(inference, scales, flip)
        self.resize = resize

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image | np.ndarray, name: str | None = None) -> SegmentedImage:
        """Segments one image.

        Args:
            image: a file, a Pillow image or an RGB array uint8 [H, W, 3].
            name: of the result. By default the file's name without suffix, or "image".

        Raises:
            UserError: the image cannot be read.
        """
        photo = read_image(image)
        if name is None:
            name = Path(image).stem if isinstance(image, str | Path) else "image"
        inputs = self._prepare(photo)
        height, width = photo.shape[:2]
        result = self.augmentation(self.model, inputs, (height, width)).cpu()
        return SegmentedImage(
            name,
            photo,
            self.info,
            panoptic=result.panoptic,
            segments=result.segments,
            semantic=None if result.semantic is None else result.semantic.int(),
            instances=result.instances if self.inference.task == "instance" else None,
        )

    def _prepare(self, photo: UInt8[np.ndarray, "_ _ 3"]) -> Float[Tensor, "1 3 height width"]:
        """Resized exactly as in evaluation, then normalised."""
        unlabelled = torch.full(photo.shape[:2], VOID_ID, dtype=torch.int32)
        sample = Sample(torch.tensor(photo).permute(2, 0, 1), unlabelled, (), "")
        if self.resize is not None:
            sample = self.resize(sample)
        return normalize(sample.image.to(self.device))[None]
