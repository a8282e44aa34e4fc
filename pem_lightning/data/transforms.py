"""The paper's augmentation (albumentations), and the resizing of evaluation, as callables from Sample to Sample.

Each sample draws one seed from PyTorch's generator, which is seeded anew for every sample. albumentations' own
generators ignore that, and `set_random_seed` gives every transform the same stream, which correlates scale and flip;
here all draw from one generator in turn.

Legend: H W height and width of the source, h w those of the result.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the internet for a newer version

import albumentations as A
import cv2
import numpy as np
import torch
from jaxtyping import Int32, Integer, UInt8
from PIL import Image

from pem_lightning.images import resize as resize
from pem_lightning.images import resized_size as resized_size
from pem_lightning.types import VOID_ID, Sample, UserError

PAPER_SHORTEST_EDGES = tuple(int(0.1 * step * 1024) for step in range(5, 21))
Window = tuple[slice, slice]
"""Rows and columns, each with start and stop."""

_NEUTRAL = np.arange(256, dtype=np.uint8)


class RandomResizedCrop(A.DualTransform):
    """Resize to a random one of some shortest edges and crop at a uniformly random place; only the crop is computed.

    Image antialiased bilinear, map nearest, both as Pillow does it; albumentations resizes by OpenCV, which aliases.
    """

    def __init__(self, height: int, width: int, shortest_edges: Sequence[int], max_size: int | None) -> None:
        super().__init__(p=1.0)
        self.height, self.width = height, width
        self.shortest_edges = tuple(shortest_edges)
        self.max_size = max_size

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """Draw size and place."""
        shortest_edge = int(self.random_generator.choice(self.shortest_edges))
        height, width, *_ = params["shape"]
        size = resized_size(height, width, shortest_edge, self.max_size)
        window = []
        for length, crop in zip(size, (self.height, self.width), strict=True):
            start = int(self.random_generator.integers(max(length - crop, 0), endpoint=True))
            window.append(slice(start, min(start + crop, length)))
        return {"size": size, "window": tuple(window)}

    def apply(self, img: np.ndarray, size: tuple[int, int], window: Window, **params: Any) -> np.ndarray:
        """Of the image."""
        return resize_window(img, size, window)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], window: Window, **params: Any) -> np.ndarray:
        """Of the id map."""
        return pick_window(mask, size, window)


class SSDColorJitter(A.ImageOnlyTransform):
    """SSD's photometric distortion, with its numbers by default. (Liu et al., SSD, ECCV 2016)

    Brightness (by at most so many grey levels) first, then saturation (a factor from a range) and hue (turned by up to
    so many of 180 steps), with the contrast (a factor) either before or after them; each with `probability`. All are
    tables of 256 values, one lookup per pixel.
    """

    def __init__(
        self,
        brightness: int | float = 32,
        contrast: Sequence[int | float] = (0.5, 1.5),
        saturation: Sequence[int | float] = (0.5, 1.5),
        hue: int = 18,
        probability: int | float = 0.5,
    ) -> None:
        super().__init__(p=1.0)
        if not (0 <= brightness <= 255 and 0 <= hue <= 90 and 0 <= probability <= 1):
            raise UserError("color_jitter needs brightness from 0 to 255, hue from 0 to 90 and probability from 0 to 1")
        if not all(len(pair) == 2 and 0 <= pair[0] <= pair[1] for pair in (contrast, saturation)):
            raise UserError("color_jitter needs contrast and saturation as [lowest, highest] factors from 0 on")
        self.brightness = brightness
        self.contrast = tuple(contrast)
        self.saturation = tuple(saturation)
        self.hue = hue
        self.probability = probability

    def get_params(self) -> dict[str, Any]:
        """Draw what happens and how strongly; what does not happen is at its neutral value."""
        draw = self.random_generator
        happens = draw.random(4) < self.probability
        return {
            "brightness": draw.uniform(-self.brightness, self.brightness) if happens[0] else 0.0,
            "contrast": draw.uniform(*self.contrast) if happens[1] else 1.0,
            "saturation": draw.uniform(*self.saturation) if happens[2] else 1.0,
            "hue": int(draw.integers(-self.hue, self.hue, endpoint=True)) if happens[3] else 0,
            "contrast_first": bool(draw.integers(2)),
        }

    def apply(self, img: UInt8[np.ndarray, "H W 3"], **drawn: Any) -> UInt8[np.ndarray, "H W 3"]:
        """Distort one RGB image."""
        before, after = _table(1.0, drawn["brightness"]), _table(drawn["contrast"], 0.0)
        if drawn["contrast_first"]:
            before, after = after[before], _NEUTRAL
        img = _look_up(img, before)
        if drawn["saturation"] != 1.0 or drawn["hue"] != 0:
            hsv = cv2.cvtColor(img, cv2.COLOR_RGB2HSV)
            hues = ((np.arange(256) + drawn["hue"]) % 180).astype(np.uint8)
            img = cv2.LUT(hsv, np.dstack([hues, _table(drawn["saturation"], 0.0), _NEUTRAL]))
            img = cv2.cvtColor(img, cv2.COLOR_HSV2RGB)
        return _look_up(img, after)


def _look_up(image: UInt8[np.ndarray, "height width 3"], table: UInt8[np.ndarray, "256"]) -> np.ndarray:
    return image if np.array_equal(table, _NEUTRAL) else cv2.LUT(image, table)


def _table(factor: float, offset: float) -> UInt8[np.ndarray, "256"]:
    """`factor * value + offset` for each value, cut off at 0 and 255 and rounded down."""
    return np.clip(np.arange(256, dtype=np.float32) * factor + offset, 0, 255).astype(np.uint8)


class TrainTransform:
    """The paper's augmentation: resize, crop, colour jitter, flip, pad; by default with its numbers for Cityscapes.

    Segments that the crop removed from the map stay listed in the sample. All sizes are in pixels.

    Args:
        crop_size: height and width of the crop; smaller images keep their size unless `pad` is set.
        shortest_edges: one is drawn per sample.
        max_size: upper bound of the longest edge after resizing.
        color_jitter: True for SSD's.
        flip: probability of a horizontal flip.
        pad: fill up to the crop size at bottom and right: image `pad_value`, map void.
    """

    def __init__(
        self,
        crop_size: Sequence[int] = (512, 1024),
        shortest_edges: Sequence[int] = PAPER_SHORTEST_EDGES,
        max_size: int | None = 4096,
        color_jitter: SSDColorJitter | bool | None = True,
        flip: int | float = 0.5,
        pad: bool = False,
        pad_value: int = 128,
    ) -> None:
        if len(crop_size) != 2 or not shortest_edges or not _positive(*crop_size, *shortest_edges, max_size):
            raise UserError("crop_size must be two positive lengths, shortest_edges and max_size positive lengths")
        if not 0 <= flip <= 1:
            raise UserError(f"flip={flip} is no probability: give a number from 0 to 1")
        if not 0 <= pad_value <= 255:
            raise UserError(f"pad_value={pad_value} is no grey level: give a number from 0 to 255")
        height, width = crop_size
        steps: list[A.BasicTransform] = [RandomResizedCrop(height, width, shortest_edges, max_size)]
        if color_jitter:
            steps.append(SSDColorJitter() if color_jitter is True else color_jitter)
        steps.append(A.HorizontalFlip(p=flip))
        if pad:
            steps.append(A.PadIfNeeded(height, width, position="top_left", fill=pad_value, fill_mask=VOID_ID))
        self.pipeline = A.Compose(steps)

    def __call__(self, sample: Sample) -> Sample:
        """Augment one sample, by PyTorch's random generator."""
        seed = int(torch.randint(2**63 - 1, ()))
        self.pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
        out = self.pipeline(image=sample.image.permute(1, 2, 0).numpy(), mask=sample.panoptic.numpy())
        image = torch.from_numpy(out["image"]).permute(2, 0, 1).contiguous()
        return sample._replace(image=image, panoptic=torch.from_numpy(out["mask"]))


class EvalTransform:
    """Resizes the image, unless `shortest_edge` is None; the annotation keeps its size, at which results are judged."""

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
        return sample._replace(image=torch.from_numpy(resize(image, size)).permute(2, 0, 1).contiguous())


def square_transforms(edge: int) -> tuple[TrainTransform, EvalTransform]:
    """The paper's for ADE20K (`edge` 640, semantic 512): padded square crops at 0.5 to 2.0 times their size."""
    edges = [int(0.1 * step * edge) for step in range(5, 21)]
    return TrainTransform((edge, edge), edges, max_size=4 * edge, pad=True), EvalTransform(edge, max_size=4 * edge)


def _positive(*lengths: int | None) -> bool:
    return all(length is None or length > 0 for length in lengths)


_NEAR = 16


def resize_window(
    image: UInt8[np.ndarray, "H W 3"], size: tuple[int, int], window: Window
) -> UInt8[np.ndarray, "h w 3"]:
    """A window of `resize(image, size)`, computed from the part of the source that it depends on.

    Within one grey level. Pillow keeps the ends of a box in single precision; one call with a box would be off by two
    now and then. So each axis is resized between places where source and result share a pixel border, which is exact:
    always horizontally, vertically where such borders are near.
    """
    (height, width), (new_height, new_width), (rows, columns) = image.shape[:2], size, window
    top, bottom = _widened(rows, new_height // math.gcd(height, new_height), at_most=_NEAR)
    left, right = _widened(columns, new_width // math.gcd(width, new_width))
    ys, y0, y1 = _source(top, bottom, height, new_height)
    xs, x0, x1 = _source(left, right, width, new_width)
    part = Image.fromarray(np.ascontiguousarray(image[ys, xs]))
    part = part.resize((right - left, part.height), Image.Resampling.BILINEAR, box=(x0, 0, x1, part.height))
    part = part.crop((columns.start - left, 0, columns.stop - left, part.height))
    part = part.resize((part.width, bottom - top), Image.Resampling.BILINEAR, box=(0, y0, part.width, y1))
    return np.array(part)[rows.start - top : rows.stop - top]


def pick_window(
    values: Integer[np.ndarray, "H W"], size: tuple[int, int], window: Window
) -> Integer[np.ndarray, "h w"]:
    """A window of a map that is resized to the nearest value, exactly as Pillow does."""
    rows, columns = (_nearest(*axis)[cut] for *axis, cut in zip(values.shape, size, window, strict=True))
    top, left = int(rows[0]), int(columns[0])
    source = values[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    return source.take(rows - top, axis=0).take(columns - left, axis=1)


def _widened(cut: slice, step: int, at_most: int | None = None) -> tuple[int, int]:
    """Start and stop of a cut, widened to multiples of a step, unless the step is too long."""
    if at_most is not None and step > at_most:
        return cut.start, cut.stop
    return cut.start // step * step, -(-cut.stop // step) * step


def _source(start: int, stop: int, length: int, new_length: int) -> tuple[slice, float, float]:
    """The source pixels that a stretch of a resized axis depends on, and the stretch's ends among them."""
    reach = max(length / new_length, 1.0)  # of the bilinear filter, which widens when it shrinks
    first, last = start * length / new_length, stop * length / new_length
    pixels = slice(max(math.floor(first - reach), 0), min(math.ceil(last + reach), length))
    return pixels, first - pixels.start, last - pixels.start


def _nearest(length: int, new_length: int) -> Int32[np.ndarray, " new_length"]:
    """The source index of every pixel of a resized axis, by Pillow itself: a formula would round ties otherwise."""
    indices = Image.fromarray(np.arange(length, dtype=np.int32)[None])
    return np.array(indices.resize((new_length, 1), Image.Resampling.NEAREST))[0]
