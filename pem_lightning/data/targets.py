"""From a sample to what the losses and metrics compare with, per task."""

from __future__ import annotations

import torch

from pem_lightning.types import IGNORE_INDEX, Sample, Target, Task


def build_target(sample: Sample, task: Task, keep_empty: bool = True) -> Target:
    """The target of one augmented sample; unlabelled pixels belong to no mask.

    Args:
        task: "panoptic": one mask per segment but crowds. "instance": single things only. "semantic": one mask per
            class in the image, crowds included.
        keep_empty: keep segments that augmentation removed from the map, as empty masks (as the authors train). A
            semantic target never has empty masks.
    """
    if task == "semantic":
        classes = sample.class_map()
        counts = torch.bincount(classes.flatten(), minlength=IGNORE_INDEX + 1)
        labels = counts[:IGNORE_INDEX].nonzero().flatten()
        return Target(labels, classes == labels[:, None, None])
    chosen = [s for s in sample.segments if not s.is_crowd and (s.is_thing or task == "panoptic")]
    labels = torch.tensor([s.class_id for s in chosen], dtype=torch.int64)
    ids = torch.tensor([s.id for s in chosen], dtype=torch.int32)
    masks = sample.panoptic == ids[:, None, None]  # [segments, height, width]
    if not keep_empty:
        visible = masks.any(2).any(1)
        labels, masks = labels[visible], masks[visible]
    return Target(labels, masks)
