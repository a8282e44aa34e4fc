"""From a sample to what the losses and metrics compare with, per task. N segments, H W the map's size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, get_args

import torch
from jaxtyping import Int64
from torch import Tensor

from pem_lightning.types import IGNORE_INDEX, Sample, Segment, Target, UserError

Task = Literal["panoptic", "semantic", "instance"]


def check_task(task: str) -> None:
    """Refuse an unknown task.

    Raises:
        UserError: `task` is none of `Task`.
    """
    if task not in get_args(Task):
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(get_args(Task))}")


def build_target(sample: Sample, task: Task, keep_empty: bool = True) -> Target:
    """The target of one training sample.

    Args:
        sample: after augmentation.
        task: "panoptic": one mask per segment. "instance": things only. "semantic": one mask per class in the image.
        keep_empty: keep segments that augmentation removed from the map, as empty masks (as the authors train). A
            semantic target never has empty masks.
    """
    if task == "semantic":
        return semantic_target(sample)
    return panoptic_target(sample, keep_empty) if task == "panoptic" else instance_target(sample, keep_empty)


def panoptic_target(sample: Sample, keep_empty: bool = True) -> Target:
    """One mask per segment; crowds are left out."""
    return _masks_of((s for s in sample.segments if not s.is_crowd), sample, keep_empty)


def instance_target(sample: Sample, keep_empty: bool = True) -> Target:
    """One mask per single thing: the panoptic target without stuff."""
    return _masks_of((s for s in sample.segments if s.is_thing and not s.is_crowd), sample, keep_empty)


def semantic_target(sample: Sample) -> Target:
    """One mask per class in the image, crowds included; unlabelled pixels belong to no mask."""
    classes = class_map(sample)
    counts = torch.bincount(classes.flatten(), minlength=IGNORE_INDEX + 1)
    labels = counts[:IGNORE_INDEX].nonzero().flatten()
    return Target(labels, classes == labels[:, None, None])


def class_map(sample: Sample) -> Int64[Tensor, "map_height map_width"]:
    """Class index of every pixel, `IGNORE_INDEX` where nothing is annotated."""
    return sample.class_map()


def _masks_of(segments: Iterable[Segment], sample: Sample, keep_empty: bool) -> Target:
    chosen = list(segments)
    labels = torch.tensor([s.class_id for s in chosen], dtype=torch.int64)
    ids = torch.tensor([s.id for s in chosen], dtype=torch.int32)
    masks = sample.panoptic == ids[:, None, None]  # [N, H, W]
    if not keep_empty:
        visible = masks.any(2).any(1)
        labels, masks = labels[visible], masks[visible]
    return Target(labels, masks)
