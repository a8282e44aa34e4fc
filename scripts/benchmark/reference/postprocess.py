"""MaskFormer's post-processing as it is usually written: all masks at full resolution, segment after segment.

Legend: Q queries, K classes, M masks, H W spatial, h w spatial at a quarter of the padded size.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor

from pem_lightning.types import VOID_ID, Segment

Size = tuple[int, int]


def semantic(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded_size: Size,
    image_size: Size,
    output_size: Size,
    resize_first: bool,
) -> Float[Tensor, "K H W"]:
    """Scores of all classes at all pixels; for the arguments see `inference.postprocess.semantic`."""
    masks = _resize(mask_logits, padded_size)[:, : image_size[0], : image_size[1]]
    if resize_first:
        masks = _resize(masks, output_size)
    scores = torch.einsum("qk,qhw->khw", class_logits.softmax(-1)[:, :-1], masks.sigmoid())
    return scores if resize_first else _resize(scores, output_size)


def panoptic(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded_size: Size,
    image_size: Size,
    output_size: Size,
    thing_classes: Collection[int],
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> tuple[Int32[Tensor, "H W"], list[Segment]]:
    """The id map and its segments; for the arguments see `inference.postprocess.panoptic`."""
    masks = _resize(mask_logits, padded_size)[:, : image_size[0], : image_size[1]]
    masks = _resize(masks, output_size).sigmoid()
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels, masks = scores[kept], labels[kept], masks[kept]
    id_map = torch.full(output_size, VOID_ID, dtype=torch.int32, device=masks.device)
    segments: list[Segment] = []
    stuff_ids: dict[int, int] = {}
    if len(masks) == 0:
        return id_map, segments
    winner = (scores[:, None, None] * masks).argmax(0)
    for m, (class_id, score) in enumerate(zip(labels.tolist(), scores.tolist(), strict=True)):
        own = masks[m] >= 0.5
        won = winner == m
        visible = won & own
        if not visible.any() or won.sum().item() / own.sum().item() < overlap_threshold:
            continue
        if class_id in stuff_ids:
            id_map[visible] = stuff_ids[class_id]
            continue
        segments.append(Segment(len(segments) + 1, class_id, class_id in thing_classes, score=score))
        id_map[visible] = segments[-1].id
        if class_id not in thing_classes:
            stuff_ids[class_id] = segments[-1].id
    return id_map, segments


def _resize(maps: Float[Tensor, "M _ _"], size: Size) -> Float[Tensor, "M H W"]:
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
