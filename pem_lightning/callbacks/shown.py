"""What a picture of one prediction shows, and the picture: image, truth and prediction."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int32, Integer, UInt8
from PIL import Image
from torch import Tensor

from pem_lightning.data.targets import class_map
from pem_lightning.inference.postprocess import Result
from pem_lightning.inference.results import stack_instances
from pem_lightning.inference.visualize import overlay_panoptic, side_by_side
from pem_lightning.types import VOID_ID, DatasetInfo, Sample, Segment

LEGIBLE_HEIGHT = 256
"""Smaller images are enlarged, so that the names on them can be read."""

Segmentation = tuple[Int32[Tensor, "map_height map_width"], tuple[Segment, ...]]
"""An id map and what its ids mean."""


Pictures = dict[str, UInt8[np.ndarray, "_ _ 3"]]
"""By title."""


class Shown(NamedTuple):
    """What a panel shows of one image: on the CPU, and small enough to keep some."""

    image: UInt8[Tensor, "3 height width"]
    truth: Segmentation
    prediction: Segmentation


def shown(sample: Sample, result: Result, info: DatasetInfo) -> Shown:
    """What the task of a result is about: segments, single things or classes."""
    image, ids, result = sample.image.cpu(), sample.panoptic.cpu(), result.cpu()
    if result.panoptic is not None:
        return Shown(image, (ids, sample.segments), (result.panoptic, result.segments))
    if result.semantic is not None:
        truth = class_map(sample._replace(panoptic=ids))
        return Shown(image, _regions(truth, info), _regions(result.semantic, info))
    objects, segments = stack_instances(result.instances, tuple(ids.shape))
    things = tuple(segment for segment in sample.segments if segment.is_thing)
    return Shown(image, (ids, things), (objects, tuple(segments)))


def _regions(classes: Integer[Tensor, "map_height map_width"], info: DatasetInfo) -> Segmentation:
    """A class map as one segment per class."""
    ids = torch.where(classes < info.num_classes, classes + 1, VOID_ID).int()
    return ids, tuple(Segment(k + 1, k, is_thing=False) for k in range(info.num_classes))


def photograph(what: Shown, factor: int = 1) -> UInt8[np.ndarray, "height width 3"]:
    """The image at a multiple of its annotation's size: evaluation may have resized the one and not the other."""
    height, width = what.truth[0].shape
    image = Image.fromarray(what.image.permute(1, 2, 0).numpy())
    return np.array(image.resize((factor * width, factor * height), Image.Resampling.BICUBIC))


def draw_pictures(what: Shown, info: DatasetInfo) -> Pictures:
    """Image, truth and prediction, at the annotation's size or at its least multiple that is legible."""
    factor = -(-LEGIBLE_HEIGHT // what.truth[0].shape[0])
    photo = photograph(what, factor)

    def overlay(ids: Tensor, segments: tuple[Segment, ...]) -> np.ndarray:
        enlarged = ids.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
        return overlay_panoptic(photo, enlarged, segments, info)

    return {"image": photo, "truth": overlay(*what.truth), "prediction": overlay(*what.prediction)}


def draw_panel(pictures: Pictures) -> UInt8[np.ndarray, "height width 3"]:
    """The pictures side by side under their titles."""
    return side_by_side(list(pictures.values()), list(pictures))
