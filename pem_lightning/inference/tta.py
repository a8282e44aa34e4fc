"""Test-time augmentation of semantic segmentation: class scores averaged over sizes and mirrored images.

As Mask2Former's `SemanticSegmentorWithTTA`. Segments and objects have no such average: their queries have no common
order from view to view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pem_lightning.inference.postprocess import Result, Size, TaskInference, size_of
from pem_lightning.types import Predictions, UserError

Network = Callable[[Tensor], Predictions]
"""Normalised images [B, 3, H, W] -> predictions."""


class TestTimeAugmentation:
    """Network and post-processing together, with views of the image between them.

    Args:
        inference: post-processing of the task.
        scales: sizes of the views, relative to the image. One scale of 1 without `flip` is no augmentation at all.
        flip: see every size also mirrored.

    Raises:
        UserError: there is no scale, one is not above 0, or the task is not semantic.
    """

    __test__ = False  # no class of tests, whatever its name begins with

    def __init__(self, inference: TaskInference, scales: Sequence[float] = (1.0,), flip: bool = False) -> None:
        if not scales or min(scales) <= 0:
            raise UserError(f"inference.scales={list(scales)}: give one or more numbers above 0, e.g. [0.75,1.0,1.25]")
        self.inference = inference
        self.scales = sorted(scales, reverse=True)
        self.flip = flip
        self.is_on = flip or self.scales != [1.0]
        if self.is_on and inference.task != "semantic":
            raise UserError(
                "inference.scales and inference.flip average class scores, which only task=semantic has: "
                f"choose task=semantic, or leave them out for task={inference.task}"
            )

    def __call__(
        self, network: Network, images: Float[Tensor, "B 3 H W"], output_size: Size, *, with_semantic: bool = False
    ) -> list[Result]:
        """Process normalised images of one size; `network` is called once for every view.

        Views are resized bilinearly with antialiasing, as Pillow does but for its rounding.
        """
        if not self.is_on:
            return [
                self.inference(one, size_of(images), output_size, with_semantic=with_semantic)
                for one in _one_by_one(network(images))
            ]
        return [Result(semantic=scores.argmax(0).int()) for scores in self.scores(network, images, output_size)]

    def scores(
        self, network: Network, images: Float[Tensor, "B 3 H W"], output_size: Size
    ) -> list[Float[Tensor, "classes height width"]]:
        """Class scores of each image, summed over the views."""
        height, width = size_of(images)
        totals: dict[int, Float[Tensor, "classes height width"]] = {}  # have the same argmax as means
        for scale in self.scales:
            size = max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)
            view = images
            if size != (height, width):
                view = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
            for flipped in (False, True) if self.flip else (False,):
                predictions = network(view.flip(-1) if flipped else view)
                for i, one in enumerate(_one_by_one(predictions)):
                    scores = self.inference.scores(one, size, output_size)
                    scores = scores.flip(-1) if flipped else scores
                    totals[i] = totals[i].add_(scores) if i in totals else scores
        return list(totals.values())


def _one_by_one(predictions: Predictions) -> list[Predictions]:
    """Batches of one."""
    parts = zip(predictions.class_logits.split(1), predictions.mask_logits.split(1), strict=True)
    return [Predictions(classes, masks) for classes, masks in parts]
