"""Augmentation and resizing where the paper trains on square crops: ADE20K, and data sets that follow it."""

from __future__ import annotations

from pem_lightning.data.transforms import EvalTransform, TrainTransform


def square_crops(edge: int) -> TrainTransform:
    """Square crops, padded where the image is smaller, from images whose shortest edge is 0.5 to 2.0 times as long.

    Args:
        edge: of the crop, in pixels; the paper's are 640 (ADE20K panoptic) and 512 (ADE20K semantic).
    """
    edges = [int(0.1 * step * edge) for step in range(5, 21)]
    return TrainTransform((edge, edge), edges, max_size=4 * edge, pad=True)


def resized_to_crops(edge: int) -> EvalTransform:
    """Evaluation images at the size that `square_crops` trains on."""
    return EvalTransform(edge, max_size=4 * edge)
