"""From one image's logits to a semantic map, a panoptic map or instances. Pure functions.

The rules are those of MaskFormer and Mask2Former. Mask logits come at a quarter of the padded size; they are resized
to the padded size, cut to the image and resized to the output size, bilinearly. Sizes are (height, width). Maps are
made in strips of rows, so that all masks or all class scores are never held at the full size. Where the output has the
image's own size, `fast_argmax` finds the winners.

Legend: Q queries, K classes, M masks, H W the output, h w a quarter of the padded size, R rows of a strip.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

from pem_lightning.inference.fast_argmax import STRIDE, fast_class_map, fast_winner_map
from pem_lightning.types import VOID_ID, Instance, Predictions, Result, Segment

Size = tuple[int, int]

ELEMENTS_AT_ONCE = 2**21
"""How many numbers of a strip are held at once (8 MiB)."""


class _Sizes(NamedTuple):
    padded: Size
    image: Size
    output: Size


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
        output_size: of the result.
        resize_first: resize masks to the output size and then score (the authors' panoptic models), or score at
            the image's size and then resize (their semantic models).
    """
    sizes = _Sizes(padded_size, image_size, output_size)
    return torch.cat(list(_score_strips(class_logits, mask_logits, sizes, resize_first)), dim=1)


def semantic_map(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    *,
    padded_size: Size,
    image_size: Size,
    output_size: Size,
    resize_first: bool,
) -> Int32[Tensor, "H W"]:
    """The class with the highest score of `semantic`, without holding the scores."""
    sizes = _Sizes(padded_size, image_size, output_size)
    if _is_upsampled_by_stride(mask_logits, sizes):
        mask_logits = _full_precision(mask_logits)
        weights = class_logits.to(mask_logits.dtype).softmax(-1)[:, :-1]
        return fast_class_map(weights, mask_logits, image_size)
    strips = _score_strips(class_logits, mask_logits, sizes, resize_first)
    return torch.cat([scores.argmax(0).int() for scores in strips])


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
        class_logits, mask_logits, padded_size, image_size, output_size: see `semantic`.
        thing_classes: their queries are separate segments; queries of any other class are merged.
        object_mask_threshold: queries are left out unless their class probability is above it.
        overlap_threshold: a query is dropped unless it wins this fraction of its own mask.

    Returns:
        The id map (`VOID_ID` where no segment is) and its segments with ids 1, 2, ... in query order. Merged stuff has
        the score of its first query.
    """
    scores, labels = _full_precision(class_logits).softmax(-1).max(-1)
    none = class_logits.shape[-1] - 1
    kept = torch.nonzero((labels != none) & (scores > object_mask_threshold)).squeeze(1)
    if len(kept) == 0:
        return torch.full(output_size, VOID_ID, dtype=torch.int32, device=mask_logits.device), []

    scores, labels = scores[kept], labels[kept]
    sizes = _Sizes(padded_size, image_size, output_size)
    if _is_upsampled_by_stride(mask_logits, sizes):
        winner, areas = fast_winner_map(_full_precision(mask_logits[kept]), scores, image_size)
    else:
        winner, areas = _winner_map(mask_logits[kept], scores, sizes)
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

    Returns:
        Instances by falling score. Masks may overlap and may be empty.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    masks: dict[int, tuple[Bool[Tensor, "H W"], float]] = {}
    found = []
    for score, pair in zip(scores.tolist(), pairs.tolist(), strict=True):
        query, class_id = divmod(pair, probabilities.shape[1])
        if class_id not in thing_classes:
            continue
        if query not in masks:
            sizes = _Sizes(padded_size, image_size, output_size)
            logits = _mask_rows(mask_logits[query : query + 1], range(output_size[0]), sizes)[0]
            mask = logits > 0
            masks[query] = mask, ((logits.sigmoid() * mask).sum() / (mask.sum() + 1e-6)).item()
        mask, mask_score = masks[query]
        found.append(Instance(mask, class_id, score * mask_score))
    return sorted(found, key=lambda instance: -instance.score)


@dataclass
class TaskInference:
    """Post-processing with the settings of a task: "panoptic", "semantic" or "instance"."""

    task: str
    thing_classes: Collection[int]
    _: KW_ONLY
    resize_first: bool = True  # see `semantic`
    object_mask_threshold: float = 0.8  # see `panoptic`
    overlap_threshold: float = 0.8
    top_k: int = 100  # see `instances`

    def __call__(
        self, predictions: Predictions, image_size: Size, output_size: Size, *, with_semantic: bool = False
    ) -> Result:
        """Process one image, a batch of one; `with_semantic` fills `Result.semantic` whatever the task."""
        class_logits, mask_logits = predictions.class_logits[0], predictions.mask_logits[0]
        at = _sizes_of(mask_logits, image_size, output_size)
        class_map, id_map = None, None
        segments: list[Segment] = []
        found: list[Instance] = []
        if with_semantic or self.task == "semantic":
            class_map = semantic_map(class_logits, mask_logits, resize_first=self.resize_first, **at)
        if self.task == "panoptic":
            id_map, segments = panoptic(
                class_logits,
                mask_logits,
                thing_classes=self.thing_classes,
                object_mask_threshold=self.object_mask_threshold,
                overlap_threshold=self.overlap_threshold,
                **at,
            )
        if self.task == "instance":
            found = instances(class_logits, mask_logits, thing_classes=self.thing_classes, top_k=self.top_k, **at)
        return Result(class_map, id_map, tuple(segments), tuple(found))

    def scores(
        self, predictions: Predictions, image_size: Size, output_size: Size
    ) -> Float[Tensor, "classes height width"]:
        """Class scores of one image, a batch of one; see `semantic`."""
        class_logits, mask_logits = predictions.class_logits[0], predictions.mask_logits[0]
        at = _sizes_of(mask_logits, image_size, output_size)
        return semantic(class_logits, mask_logits, resize_first=self.resize_first, **at)


def _sizes_of(mask_logits: Float[Tensor, "Q h w"], image_size: Size, output_size: Size) -> dict[str, Size]:
    height, width = size_of(mask_logits)
    return {"padded_size": (STRIDE * height, STRIDE * width), "image_size": image_size, "output_size": output_size}


def size_of(x: Tensor) -> Size:
    """Height and width, the last two axes."""
    return x.shape[-2], x.shape[-1]


def _winner_map(
    mask_logits: Float[Tensor, "M h w"], scores: Float[Tensor, " M"], sizes: _Sizes
) -> tuple[Int32[Tensor, "H W"], Int64[Tensor, "M 3"]]:
    """`fast_winner_map` for any output size."""
    M = len(mask_logits)
    areas = torch.zeros(M, 3, dtype=torch.int64, device=mask_logits.device)
    winners = []
    for rows in _strips(sizes.output, M):
        probability = _mask_rows(mask_logits, rows, sizes).sigmoid()
        own = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
        winner = probability.mul_(scores[:, None, None]).argmax(0)
        visible = own.gather(0, winner[None])[0]
        areas[:, 0] += torch.bincount(winner.flatten(), minlength=M)
        areas[:, 1] += own.sum((1, 2))
        winner = torch.where(visible, winner, M).int()
        areas[:, 2] += torch.bincount(winner.flatten(), minlength=M + 1)[:M]
        winners.append(winner)
    return torch.cat(winners), areas


def _score_strips(
    class_logits: Float[Tensor, "Q classes_and_none"],
    mask_logits: Float[Tensor, "Q h w"],
    sizes: _Sizes,
    resize_first: bool,
) -> Iterator[Float[Tensor, "K R W"]]:
    """Class scores of some rows of the output at once."""
    weights = class_logits.to(_full_precision(mask_logits).dtype).softmax(-1)[:, :-1].T  # K Q
    scored = sizes if resize_first else sizes._replace(output=sizes.image)
    for rows in _strips(sizes.output, len(mask_logits)):
        same = scored.output == sizes.output
        source = rows if same else source_rows(rows, scored.output[0], sizes.output[0])
        masks = _mask_rows(mask_logits, source, scored).sigmoid()
        scores = (weights @ masks.flatten(1)).unflatten(1, masks.shape[1:])
        yield scores if same else resize_rows(scores, source, rows, scored.output, sizes.output)


def _strips(size: Size, num_maps: int) -> Iterator[range]:
    step = max(1, ELEMENTS_AT_ONCE // max(num_maps * size[1], 1))
    for start in range(0, size[0], step):
        yield range(start, min(start + step, size[0]))


def _mask_rows(mask_logits: Float[Tensor, "M h w"], rows: range, sizes: _Sizes) -> Float[Tensor, "M R W"]:
    """Some rows of the masks at the output size."""
    quarter_size = size_of(mask_logits)
    same = sizes.output == sizes.image
    image_rows = rows if same else source_rows(rows, sizes.image[0], sizes.output[0])
    quarter_rows = source_rows(image_rows, quarter_size[0], sizes.padded[0])
    part = _full_precision(mask_logits[:, quarter_rows.start : quarter_rows.stop])
    image = resize_rows(part, quarter_rows, image_rows, quarter_size, sizes.padded)[:, :, : sizes.image[1]]
    return image if same else resize_rows(image, image_rows, rows, sizes.image, sizes.output)


def source_rows(rows: range, source_height: int, height: int) -> range:
    """The rows of a map of `source_height` that are needed for some rows of its resized version of `height`."""
    upper, lower, _ = _neighbours(torch.arange(rows.start, rows.stop, dtype=torch.float64), source_height, height)
    # `resize_rows` computes places in the map's own precision, which may round to the next row.
    return range(max(int(upper[0]) - 1, 0), min(int(lower[-1]) + 2, source_height))


def resize_rows(
    part: Float[Tensor, "M _ W"], part_rows: range, rows: range, source_size: Size, size: Size
) -> Float[Tensor, "M R W_out"]:
    """Some rows of a resized map, equal to those of `F.interpolate(mode="bilinear", align_corners=False)`.

    `part` has at least the rows that `source_rows` names; `part_rows` are their numbers in the whole source.
    """
    if source_size[0] == size[0]:
        part = part[:, rows.start - part_rows.start : rows.stop - part_rows.start]
    else:
        numbers = torch.arange(rows.start, rows.stop, dtype=part.dtype, device=part.device)
        upper, lower, weight = _neighbours(numbers, source_size[0], size[0])
        part = torch.lerp(part[:, upper - part_rows.start], part[:, lower - part_rows.start], weight[:, None])
    if source_size[1] == size[1]:
        return part
    return F.interpolate(part[None], size=(len(rows), size[1]), mode="bilinear", align_corners=False)[0]


def _neighbours(
    numbers: Float[Tensor, " R"], source_height: int, height: int
) -> tuple[Int64[Tensor, " R"], Int64[Tensor, " R"], Float[Tensor, " R"]]:
    """The source rows above and below each row of the result, and the weight of the one below."""
    place = ((numbers + 0.5) * (source_height / height) - 0.5).clamp(min=0)
    upper = place.long().clamp(max=source_height - 1)
    return upper, (upper + 1).clamp(max=source_height - 1), (place - upper).clamp(0, 1)


def _is_upsampled_by_stride(mask_logits: Float[Tensor, "Q h w"], sizes: _Sizes) -> bool:
    _, height, width = mask_logits.shape
    return sizes.output == sizes.image and sizes.padded == (STRIDE * height, STRIDE * width)


def _full_precision(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()
