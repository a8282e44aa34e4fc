"""From one image's logits to a semantic map, a panoptic map or instances. Pure functions.

The rules are those of MaskFormer and Mask2Former, which PEM keeps. Mask logits arrive at a quarter of the
padded size; every function brings them to the padded size, cuts the padding off and resizes to the output
size, bilinearly. Sizes are (height, width).

Q queries, K classes, M masks, H W spatial, h w spatial at a quarter of the padded size
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from pem_lightning.types import VOID_ID, Segment

Size = tuple[int, int]

QUERIES_AT_ONCE = 16
"""How many queries semantic inference holds at full resolution (8 MiB each at 1024 x 2048)."""


class Instance(NamedTuple):
    """One detected object.

    Attributes:
        mask: its pixels, at the output size.
        class_id: contiguous class index.
        score: class probability times the mean mask probability inside the mask, in [0, 1].
    """

    mask: Bool[Tensor, "height width"]
    class_id: int
    score: float


def semantic(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded_size: Size,
    image_size: Size,
    output_size: Size,
    resize_first: bool,
) -> Float[Tensor, "K H W"]:
    """Score of every class at every pixel: the sum over queries of class probability times mask probability.

    Args:
        class_logits: scores of the K classes and, last, of "no object".
        mask_logits: positive means foreground.
        padded_size: what the network saw, padding included.
        image_size: its part that is image, at the top left.
        output_size: what the result is wanted at.
        resize_first: resize masks to the output size and then score (the authors' panoptic models), or score at
            the image's size and then resize (their semantic models).

    Returns:
        Scores at the output size, float32, 0 or more. Their argmax over K is the class map.
    """
    weights = class_logits.float().softmax(-1)[:, :-1].T  # [K, Q]
    scoring_size = output_size if resize_first else image_size
    scores = weights.new_zeros(len(weights), scoring_size[0] * scoring_size[1])
    for start in range(0, len(mask_logits), QUERIES_AT_ONCE):
        chunk = slice(start, start + QUERIES_AT_ONCE)
        masks = _resize_masks(mask_logits[chunk], padded_size, image_size, scoring_size).sigmoid()
        scores.addmm_(weights[:, chunk], masks.flatten(1))  # [K, M] @ [M, H W]
    return _resize(scores.unflatten(1, scoring_size), output_size)


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
    """Every pixel goes to the query with the highest class times mask probability, or to none.

    Args:
        class_logits: scores of the K classes and, last, of "no object".
        mask_logits: positive means foreground.
        padded_size: what the network saw, padding included.
        image_size: its part that is image, at the top left.
        output_size: what the result is wanted at.
        thing_classes: the classes whose queries are separate segments; queries of one other class are merged.
        object_mask_threshold: queries whose class probability is not above it are left out.
        overlap_threshold: a query is dropped unless it wins this fraction of its own mask.

    Returns:
        The id map (`VOID_ID` where no segment is) and its segments with ids 1, 2, ... in query order. The score of
        merged stuff is that of the first query.
    """
    scores, labels = class_logits.float().softmax(-1).max(-1)
    none = class_logits.shape[-1] - 1
    kept = torch.nonzero((labels != none) & (scores > object_mask_threshold)).squeeze(1)
    if len(kept) == 0:
        return torch.full(output_size, VOID_ID, dtype=torch.int32, device=mask_logits.device), []

    scores, labels = scores[kept], labels[kept]
    winner, areas = _compete(mask_logits[kept], scores, padded_size, image_size, output_size)
    segments: list[Segment] = []
    stuff_ids: dict[int, int] = {}
    ids = [VOID_ID] * (len(kept) + 1)  # of each query's pixels; the last is for pixels outside the winner's mask
    for m, (class_id, score, (won, own, visible)) in enumerate(
        zip(labels.tolist(), scores.tolist(), areas.tolist(), strict=True)
    ):
        if visible == 0 or won / own < overlap_threshold:
            continue
        if class_id in stuff_ids:
            ids[m] = stuff_ids[class_id]
            continue
        ids[m] = len(segments) + 1
        is_thing = class_id in thing_classes
        segments.append(Segment(ids[m], class_id, is_thing, score=score))
        if not is_thing:
            stuff_ids[class_id] = ids[m]
    return torch.tensor(ids, dtype=torch.int32, device=winner.device)[winner], segments


def instances(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded_size: Size,
    image_size: Size,
    output_size: Size,
    thing_classes: Collection[int],
    top_k: int = 100,
) -> list[Instance]:
    """The `top_k` most probable pairs of query and class, of which those are returned whose class is a thing.

    As in Mask2Former, one query may appear with several classes, and things compete with stuff for the places.

    Args:
        class_logits: scores of the K classes and, last, of "no object".
        mask_logits: positive means foreground.
        padded_size: what the network saw, padding included.
        image_size: its part that is image, at the top left.
        output_size: what the result is wanted at.
        thing_classes: the classes that have instances.
        top_k: how many pairs are looked at.

    Returns:
        Instances by falling class probability. Masks may overlap and may be empty.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    masks: dict[int, tuple[Bool[Tensor, "H W"], float]] = {}
    found = []
    for score, pair in zip(scores.tolist(), pairs.tolist(), strict=True):
        query, class_id = divmod(pair, num_classes)
        if class_id not in thing_classes:
            continue
        if query not in masks:
            logits = _resize_masks(mask_logits[query : query + 1], padded_size, image_size, output_size)[0]
            mask = logits > 0
            inside = (logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
            masks[query] = mask, inside.item()
        mask, mask_score = masks[query]
        found.append(Instance(mask, class_id, score * mask_score))
    return found


def _compete(
    mask_logits: Float[Tensor, "M h w"],
    scores: Float[Tensor, " M"],
    padded_size: Size,
    image_size: Size,
    output_size: Size,
) -> tuple[Int64[Tensor, "H W"], Int64[Tensor, "M 3"]]:
    """Finds each pixel's winning query, one query after the other so that memory does not grow with their number.

    Returns:
        The winner's index per pixel, M where the pixel is outside the winner's own mask (probability below 0.5);
        and three areas per query: pixels it wins, pixels of its own mask, pixels of its own mask that it wins.
    """
    M = len(mask_logits)
    best = mask_logits.new_full(output_size, -1.0, dtype=torch.float32)  # below any probability
    winner = torch.zeros(output_size, dtype=torch.int64, device=best.device)
    in_mask = torch.zeros(output_size, dtype=torch.bool, device=best.device)
    own_areas = []
    for m in range(M):
        probability = _resize_masks(mask_logits[m : m + 1], padded_size, image_size, output_size)[0].sigmoid()
        foreground = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
        own_areas.append(foreground.sum())
        probability *= scores[m]
        wins = probability > best  # strictly: among equals the first query wins, as with argmax
        best = torch.where(wins, probability, best)
        winner = torch.where(wins, m, winner)
        in_mask = torch.where(wins, foreground, in_mask)
    won = torch.bincount(winner.flatten(), minlength=M)
    winner = torch.where(in_mask, winner, M)
    visible = torch.bincount(winner.flatten(), minlength=M + 1)[:M]
    return winner, torch.stack([won, torch.stack(own_areas), visible], dim=1)


def _resize_masks(
    mask_logits: Float[Tensor, "M h w"], padded_size: Size, image_size: Size, output_size: Size
) -> Float[Tensor, "M H W"]:
    """Logits at the output size in float32: up to the padded size, padding cut off, then to the output size."""
    padded = _resize(mask_logits.float(), padded_size)
    return _resize(padded[:, : image_size[0], : image_size[1]], output_size)


def _resize(maps: Float[Tensor, "M _ _"], size: Size) -> Float[Tensor, "M H W"]:
    if maps.shape[1:] == size:
        return maps
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
