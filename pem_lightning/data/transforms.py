"""The paper's augmentation, and the resizing of evaluation, as callables from Sample to Sample.

The annotation travels as one integer id map beside the image; masks are cut out of it afterwards.

Reproducible by `lightning.seed_everything(seed, workers=True)`: each sample draws one seed from PyTorch's generator,
which the loader seeds differently in every worker. albumentations' own generators ignore that, and `set_random_seed`
hands every transform the same stream, which correlates, say, scale and flip. Here all draw from one generator in turn.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from pem_lightning.errors import UserError
from pem_lightning.types import VOID_ID, Sample

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the internet for a newer version
import albumentations as A

PAPER_SHORTEST_EDGES = tuple(int(0.1 * step * 1024) for step in range(5, 21))
"""0.5 to 2.0 times 1024 in steps of 0.1."""

PAD_VALUE = 128
"""Grey of padded image pixels."""


def resized_size(height: int, width: int, shortest_edge: int, max_size: int | None = None) -> tuple[int, int]:
    """Height and width after bringing the shortest edge to a length, as far as the longest stays within `max_size`."""
    scale = shortest_edge / min(height, width)
    if max_size is not None:
        scale = min(scale, max_size / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


class ResizeShortestEdge(A.DualTransform):
    """Resize to a random one of some shortest edges: image antialiased bilinear, map nearest, both by Pillow.

    albumentations resizes by OpenCV, whose bilinear mode aliases when it shrinks.
    """

    def __init__(self, shortest_edges: Sequence[int], max_size: int | None) -> None:
        super().__init__(p=1.0)
        self.shortest_edges = tuple(shortest_edges)
        self.max_size = max_size

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the size."""
        shortest_edge = int(self.random_generator.choice(self.shortest_edges))
        height, width = params["shape"][:2]
        return {"size": resized_size(height, width, shortest_edge, self.max_size)}

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the image."""
        return _resize(img, size, Image.Resampling.BILINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        """Resize the id map."""
        return _resize(mask, size, Image.Resampling.NEAREST)


class RandomCropWithin(A.DualTransform):
    """Crop at a uniformly random place. An edge shorter than the crop stays whole, where albumentations refuses."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__(p=1.0)
        self.height = height
        self.width = width

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw the place."""
        image_height, image_width = params["shape"][:2]
        height, width = min(self.height, image_height), min(self.width, image_width)
        top = int(self.random_generator.integers(image_height - height, endpoint=True))
        left = int(self.random_generator.integers(image_width - width, endpoint=True))
        return {"window": (slice(top, top + height), slice(left, left + width))}

    def apply(self, img: np.ndarray, window: tuple[slice, slice], **params: Any) -> np.ndarray:
        """Cut the window out of image or map."""
        return img[window]


class SSDColorJitter(A.ImageOnlyTransform):
    """SSD's photometric distortion: brightness +-32, contrast and saturation x0.5 to 1.5, hue +-18 of 180.

    Each happens with probability 0.5, in SSD's order: brightness, then saturation and hue with the contrast either
    before or after them. Each is a table of 256 values, one lookup per pixel. (Liu et al., SSD, ECCV 2016)
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        """Draw what happens and how strongly; what does not happen is at its neutral value."""
        draw = self.random_generator
        happens = draw.random(4) < 0.5
        return {
            "brightness": draw.uniform(-32, 32) if happens[0] else 0.0,
            "contrast": draw.uniform(0.5, 1.5) if happens[1] else 1.0,
            "saturation": draw.uniform(0.5, 1.5) if happens[2] else 1.0,
            "hue": int(draw.integers(-18, 18, endpoint=True)) if happens[3] else 0,
            "contrast_first": bool(draw.integers(2)),
        }

    def apply(
        self,
        img: UInt8[np.ndarray, "height width 3"],
        brightness: float,
        contrast: float,
        saturation: float,
        hue: int,
        contrast_first: bool,
        **params: Any,
    ) -> UInt8[np.ndarray, "height width 3"]:
        """Distort one RGB image."""
        img = cv2.LUT(img, _table(1.0, brightness))
        if contrast_first:
            img = cv2.LUT(img, _table(contrast, 0.0))
        if saturation != 1.0 or hue != 0:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hues = ((np.arange(256) + hue) % 180).astype(np.uint8)
            img = cv2.LUT(hsv, np.dstack([hues, _table(saturation, 0.0), np.arange(256, dtype=np.uint8)]))
            img = cv2.cvtColor(img, cv2.COLOR_HSV2RGB)
        return img if contrast_first else cv2.LUT(img, _table(contrast, 0.0))


class TrainTransform:
    """The paper's augmentation: resize, crop, colour jitter, flip, pad. Defaults: Cityscapes.

    Segments that the crop removed from the map stay listed in the sample.

    Args:
        crop_size: height and width of the crop; smaller images keep their size unless `pad` is set.
        shortest_edges: one is drawn per sample, in pixels.
        max_size: upper bound of the longest edge after resizing, in pixels; None for no bound.
        color_jitter: whether to distort colours as SSD does.
        flip: probability of a horizontal flip.
        pad: fill up to the crop size at bottom and right: image `PAD_VALUE`, map void.

    Raises:
        UserError: a size is not positive, or the flip is no probability.
    """

    def __init__(
        self,
        crop_size: Sequence[int] = (512, 1024),
        shortest_edges: Sequence[int] = PAPER_SHORTEST_EDGES,
        max_size: int | None = 4096,
        color_jitter: bool = True,
        flip: float = 0.5,
        pad: bool = False,
    ) -> None:
        if len(crop_size) != 2 or not shortest_edges or not _positive(*crop_size, *shortest_edges, max_size):
            raise UserError("crop_size must be two positive lengths, shortest_edges and max_size positive lengths")
        if not 0 <= flip <= 1:
            raise UserError(f"flip={flip} is no probability: give a number from 0 to 1")
        height, width = crop_size
        steps: list[A.BasicTransform] = [ResizeShortestEdge(shortest_edges, max_size), RandomCropWithin(height, width)]
        if color_jitter:
            steps.append(SSDColorJitter())
        steps.append(A.HorizontalFlip(p=flip))
        if pad:
            steps.append(A.PadIfNeeded(height, width, position="top_left", fill=PAD_VALUE, fill_mask=VOID_ID))
        self.pipeline = A.Compose(steps)

    def __call__(self, sample: Sample) -> Sample:
        """Augment one sample, by PyTorch's random generator."""
        seed = int(torch.randint(2**63 - 1, ()))
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        out = self.pipeline(image=sample.image.permute(1, 2, 0).numpy(), mask=sample.panoptic.numpy())
        image = torch.from_numpy(out["image"]).permute(2, 0, 1).contiguous()
        return sample._replace(image=image, panoptic=torch.from_numpy(out["mask"]))


class EvalTransform:
    """Resizes the image only; the annotation keeps its native size, at which results are judged.

    Args:
        shortest_edge: in pixels; None keeps the native size.
        max_size: upper bound of the longest edge, in pixels.

    Raises:
        UserError: a size is not positive, or only `max_size` is given.
    """

    def __init__(self, shortest_edge: int | None = None, max_size: int | None = None) -> None:
        if shortest_edge is None and max_size is not None:
            raise UserError("max_size has no effect without shortest_edge: give both or none")
        if not _positive(shortest_edge, max_size):
            raise UserError("shortest_edge and max_size must be positive lengths, or null for the native size")
        self.shortest_edge = shortest_edge
        self.max_size = max_size

    def __call__(self, sample: Sample) -> Sample:
        """Resize the image of one sample."""
        if self.shortest_edge is None:
            return sample._replace(image=sample.image.contiguous())
        image = sample.image.permute(1, 2, 0).numpy()
        size = resized_size(image.shape[0], image.shape[1], self.shortest_edge, self.max_size)
        resized = torch.from_numpy(_resize(image, size, Image.Resampling.BILINEAR))
        return sample._replace(image=resized.permute(2, 0, 1).contiguous())


def _positive(*lengths: int | None) -> bool:
    return all(length is None or length > 0 for length in lengths)


def _resize(array: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> np.ndarray:
    height, width = size
    return np.array(Image.fromarray(array).resize((width, height), resampling))


def _table(factor: float, offset: float) -> UInt8[np.ndarray, "256"]:
    """`factor * value + offset` for each value, cut off at 0 and 255 and rounded down."""
    return np.clip(np.arange(256, dtype=np.float32) * factor + offset, 0, 255).astype(np.uint8)
