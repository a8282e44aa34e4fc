"""From one image's logits to a semantic map, a panoptic map or instances, in NumPy.

`inference.postprocess` and `inference.fast_argmax` once more, for where PyTorch is not: see there for the rules, the
arguments and the ideas. Results are the same but for the last bit of a sigmoid or a sum, which decides a pixel in a
million. Two versions, because PyTorch's runs on GPUs and on all cores.

Legend: Q queries, K classes, M masks, H W the output, h w a quarter of the padded size, R S rows and columns of cells,
N chosen cells.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from pem_lightning.basic_types import VOID_ID, Instance, Result, Segment
from pem_lightning.shapes import Bool, Float32, Int32, Int64

Size = tuple[int, int]

STRIDE = 4
"""Pixels between two logits."""
MARGIN = 1e-5
SLACK = 0.03
"""As in `fast_argmax`."""
CELL_ELEMENTS_AT_ONCE = 2**18
ELEMENTS_AT_ONCE = 2**20
"""How many numbers of a strip are held at once: of cells, which should fit into caches, and of rows (4 MiB)."""


class Sizes(NamedTuple):
    """Height and width of the masks' logits, of what the network saw, of the image in it, and of the result."""

    logits: Size
    padded: Size
    image: Size
    output: Size

    @property
    def is_upsampled_by_stride(self) -> bool:
        """Whether the result has the image's own size, so that pixels can be decided in cells."""
        return self.output == self.image


def postprocess(
    class_logits: Float32[np.ndarray, "Q classes_and_none"],
    mask_logits: Float32[np.ndarray, "Q h w"],
    *,
    task: str,
    thing_classes: Collection[int],
    image_size: Size,
    output_size: Size,
    resize_first: bool = True,
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    top_k: int = 100,
) -> Result:
    """Make the result of one image, as `TaskInference` does."""
    _, h, w = mask_logits.shape
    sizes = Sizes((h, w), (STRIDE * h, STRIDE * w), image_size, output_size)
    if task == "semantic":
        return Result(semantic=semantic_map(class_logits, mask_logits, sizes, resize_first))
    if task == "instance":
        return Result(instances=tuple(instances(class_logits, mask_logits, sizes, thing_classes, top_k)))
    id_map, segments = panoptic(
        class_logits, mask_logits, sizes, thing_classes, object_mask_threshold, overlap_threshold
    )
    return Result(panoptic=id_map, segments=tuple(segments))


def semantic_map(
    class_logits: Float32[np.ndarray, "Q classes_and_none"],
    mask_logits: Float32[np.ndarray, "Q h w"],
    sizes: Sizes,
    resize_first: bool,
) -> Int32[np.ndarray, "H W"]:
    """The class with the highest sum over queries of class probability times mask probability."""
    weights = softmax(class_logits)[:, :-1]
    if sizes.is_upsampled_by_stride:
        return fast_class_map(weights, mask_logits, sizes.image)
    scored = sizes if resize_first else sizes._replace(output=sizes.image)
    parts = []
    for rows in _strips(sizes.output, len(mask_logits)):
        source = _needed(rows, scored.output[0], sizes.output[0])
        masks = sigmoid(_masks(mask_logits, source, range(scored.output[1]), scored))
        scores = (weights.T @ masks.reshape(len(masks), -1)).reshape(-1, *masks.shape[1:])
        scores = _resize(scores, 1, source, rows, scored.output[0], sizes.output[0])
        scores = _resize(scores, 2, range(scored.output[1]), range(sizes.output[1]), scored.output[1], sizes.output[1])
        parts.append(scores.argmax(0).astype(np.int32))
    return np.concatenate(parts)


def panoptic(
    class_logits: Float32[np.ndarray, "Q classes_and_none"],
    mask_logits: Float32[np.ndarray, "Q h w"],
    sizes: Sizes,
    thing_classes: Collection[int],
    object_mask_threshold: float,
    overlap_threshold: float,
) -> tuple[Int32[np.ndarray, "H W"], list[Segment]]:
    """Every pixel goes to the query with the highest class times mask probability, or to none."""
    probabilities = softmax(class_logits)
    scores, labels = probabilities.max(1), probabilities.argmax(1)
    kept = np.flatnonzero((labels != probabilities.shape[1] - 1) & (scores > np.float32(object_mask_threshold)))
    if len(kept) == 0:
        return np.full(sizes.output, VOID_ID, np.int32), []
    scores, labels, mask_logits = scores[kept], labels[kept], mask_logits[kept]
    if sizes.is_upsampled_by_stride:
        winner, areas = fast_winner_map(mask_logits, scores, sizes.image)
    else:
        winner, areas = _winner_map(mask_logits, scores, sizes)
    segments: list[Segment] = []
    stuff_ids: dict[int, int] = {}
    ids = np.full(len(kept) + 1, VOID_ID, np.int32)  # the last is for pixels outside the winner's mask
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
        segments.append(Segment(int(ids[m]), class_id, is_thing, score=score))
        if not is_thing:
            stuff_ids[class_id] = int(ids[m])
    return ids[winner], segments


def instances(
    class_logits: Float32[np.ndarray, "Q classes_and_none"],
    mask_logits: Float32[np.ndarray, "Q h w"],
    sizes: Sizes,
    thing_classes: Collection[int],
    top_k: int,
) -> list[Instance]:
    """Things among the `top_k` most probable pairs of query and class, by falling score."""
    probabilities = softmax(class_logits)[:, :-1]
    scores = probabilities.ravel()
    masks: dict[int, tuple[Bool[np.ndarray, "H W"], float]] = {}
    found = []
    for pair in np.argsort(-scores, kind="stable")[:top_k].tolist():
        query, class_id = divmod(pair, probabilities.shape[1])
        if class_id not in thing_classes:
            continue
        if query not in masks:
            masks[query] = _mask(mask_logits[query], sizes)
        mask, mask_score = masks[query]
        found.append(Instance(mask, class_id, float(scores[pair]) * mask_score))
    return sorted(found, key=lambda instance: -instance.score)


def _mask(logits: Float32[np.ndarray, "h w"], sizes: Sizes) -> tuple[Bool[np.ndarray, "H W"], float]:
    """One mask at the output size, and its mean probability inside."""
    mask = np.zeros(sizes.output, bool)
    positive = logits > 0
    reached = [_reached(np.flatnonzero(positive.any(1 - axis)), *(size[axis] for size in sizes)) for axis in (0, 1)]
    rows, columns = reached  # elsewhere all neighbours are negative, and so is what lies between them
    if not (rows and columns):
        return mask, 0.0
    part = _masks(logits[None], rows, columns, sizes)[0]
    inside = part > 0
    mask[rows.start : rows.stop, columns.start : columns.stop] = inside
    probability = sigmoid(part[inside])
    return mask, float(probability.sum(dtype=np.float64) / (len(probability) + 1e-6))


def softmax(logits: Float32[np.ndarray, "Q n"]) -> Float32[np.ndarray, "Q n"]:
    """Probabilities of each row."""
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def sigmoid(x: Float32[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """In place."""
    with np.errstate(over="ignore"):
        np.negative(x, out=x)
        np.exp(x, out=x)
    x += 1
    return np.reciprocal(x, out=x)


# Any output size, in strips of rows.


def _winner_map(
    mask_logits: Float32[np.ndarray, "M h w"], scores: Float32[np.ndarray, " M"], sizes: Sizes
) -> tuple[Int64[np.ndarray, "H W"], Int64[np.ndarray, "M 3"]]:
    """`fast_winner_map` for any output size."""
    M = len(mask_logits)
    areas = np.zeros((M, 3), np.int64)
    winners = []
    for rows in _strips(sizes.output, M):
        probability = sigmoid(_masks(mask_logits, rows, range(sizes.output[1]), sizes))
        own = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
        probability *= scores[:, None, None]
        winner = probability.argmax(0)
        visible = np.take_along_axis(own, winner[None], 0)[0]
        areas[:, 0] += np.bincount(winner.ravel(), minlength=M)
        areas[:, 1] += own.sum((1, 2))
        winner = np.where(visible, winner, M)
        areas[:, 2] += np.bincount(winner.ravel(), minlength=M + 1)[:M]
        winners.append(winner)
    return np.concatenate(winners), areas


def _strips(size: Size, num_maps: int) -> Iterator[range]:
    step = max(1, ELEMENTS_AT_ONCE // max(num_maps * size[1], 1))
    for start in range(0, size[0], step):
        yield range(start, min(start + step, size[0]))


def _masks(
    mask_logits: Float32[np.ndarray, "M h w"], rows: range, columns: range, sizes: Sizes
) -> Float32[np.ndarray, "M R S"]:
    """Some rows and columns of the masks at the output size."""
    image = [_needed(lines, sizes.image[i], sizes.output[i]) for i, lines in enumerate((rows, columns))]
    logits = [_needed(lines, sizes.logits[i], sizes.padded[i]) for i, lines in enumerate(image)]
    x = mask_logits[:, logits[0].start : logits[0].stop, logits[1].start : logits[1].stop]
    for i in (0, 1):
        x = _resize(x, i + 1, logits[i], image[i], sizes.logits[i], sizes.padded[i])
    for i, lines in enumerate((rows, columns)):
        x = _resize(x, i + 1, image[i], lines, sizes.image[i], sizes.output[i])
    return x


def _resize(x: np.ndarray, axis: int, have: range, lines: range, source: int, size: int) -> np.ndarray:
    """Some lines of an axis that is resized bilinearly from `source` to `size`; `x` has the source's lines `have`."""
    if source == size:
        cut = slice(lines.start - have.start, lines.stop - have.start)
        return x[(slice(None),) * axis + (cut,)]
    before, after, weight = _neighbours(np.arange(lines.start, lines.stop), source, size)
    low, result = np.take(x, before - have.start, axis), np.take(x, after - have.start, axis)
    result -= low
    result *= weight.reshape(-1, *[1] * (x.ndim - 1 - axis))
    result += low
    return result


def _needed(lines: range, source: int, size: int) -> range:
    """The source's lines that some lines of the resized axis depend on."""
    if source == size:
        return lines
    before, after, _ = _neighbours(np.array([lines.start, lines.stop - 1]), source, size)
    return range(int(before[0]), int(after[-1]) + 1)


def _reached(positive: Int64[np.ndarray, " n"], logits: int, padded: int, image: int, output: int) -> range:
    """The lines of the output that depend on the sorted lines `positive` of the logits, and those between them."""
    if len(positive) == 0:
        return range(0)
    before, after, _ = _neighbours(np.arange(image), logits, padded)
    if image != output:
        first, second, _ = _neighbours(np.arange(output), image, output)
        before, after = before[first], after[second]
    found = np.flatnonzero((after >= positive[0]) & (before <= positive[-1]))
    return range(int(found[0]), int(found[-1]) + 1) if len(found) else range(0)


def _neighbours(
    numbers: Int64[np.ndarray, " n"], source: int, size: int
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """The source lines before and after each line of the result, and the weight of the latter."""
    place = np.maximum((numbers.astype(np.float32) + np.float32(0.5)) * np.float32(source / size) - np.float32(0.5), 0)
    before = np.minimum(place.astype(np.int64), source - 1)
    return before, np.minimum(before + 1, source - 1), np.clip(place - before, 0, 1).astype(np.float32)


# The image's own size, in cells of 4 x 4 pixels.


class Cells:
    """All cells of an image; see `fast_argmax.Cells`."""

    def __init__(self, mask_logits: Float32[np.ndarray, "Q h w"], image_size: Size) -> None:
        self.num_queries, self.h, self.w = mask_logits.shape
        self.height, self.width = image_size
        self.table = np.ascontiguousarray(mask_logits.transpose(1, 2, 0))  # h w Q
        self.shape = ((self.height + 1) // STRIDE + 1, (self.width + 1) // STRIDE + 1)
        self.steps = (np.arange(STRIDE, dtype=np.float32) + np.float32(0.5)) / STRIDE
        self.rows_inside, self.columns_inside = (
            self._inside(count, length) for count, length in zip(self.shape, image_size, strict=True)
        )

    def strips(self) -> Iterator[slice]:
        """Rows of cells, few enough at once for the caches of a CPU."""
        step = max(1, CELL_ELEMENTS_AT_ONCE // (self.shape[1] * max(self.num_queries, 1)))
        for start in range(0, self.shape[0], step):
            yield slice(start, min(start + step, self.shape[0]))

    def bounds(self, strip: slice) -> tuple[Float32[np.ndarray, "R S Q"], Float32[np.ndarray, "R S Q"]]:
        """Smallest and largest logit that a pixel of each cell can have."""
        # Beyond the map, its first and last row and column are repeated.
        rows = np.arange(strip.start - 1, strip.stop).clip(0, self.h - 1)
        columns = np.arange(-1, self.shape[1]).clip(0, self.w - 1)
        corners = self.table[rows][:, columns]
        low = np.minimum(corners[:, :-1], corners[:, 1:])
        high = np.maximum(corners[:, :-1], corners[:, 1:])
        return np.minimum(low[:-1], low[1:]), np.maximum(high[:-1], high[1:])

    def areas(self, strip: slice) -> Int64[np.ndarray, "R S"]:
        """Pixels of the image in each cell: 16, or fewer at the border."""
        return self.rows_inside[strip].sum(1)[:, None] * self.columns_inside.sum(1)

    def pixels(
        self, rows: Int64[np.ndarray, " N"], columns: Int64[np.ndarray, " N"]
    ) -> Iterator[tuple[slice, Float32[np.ndarray, "_ four four Q"], Bool[np.ndarray, "_ four four"]]]:
        """Logits of the chosen cells' pixels, and which pixels lie in the image; some of the N cells at once."""
        step = max(1, CELL_ELEMENTS_AT_ONCE // (STRIDE * STRIDE * max(self.num_queries, 1)))
        weight = self.steps[:, None]
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            i, j = rows[part], columns[part]
            above, below = np.maximum(i - 1, 0), np.minimum(i, self.h - 1)
            left, right = np.maximum(j - 1, 0), np.minimum(j, self.w - 1)
            at_left = _between(self.table[above, left][:, None], self.table[below, left][:, None], weight)
            at_right = _between(self.table[above, right][:, None], self.table[below, right][:, None], weight)
            logits = _between(at_left[:, :, None], at_right[:, :, None], weight)
            yield part, logits, self.rows_inside[i][:, :, None] & self.columns_inside[j][:, None, :]

    def canvas(self) -> Int32[np.ndarray, "rows 4 columns 4"]:
        """An empty map of all cells' pixels."""
        return np.empty((self.shape[0], STRIDE, self.shape[1], STRIDE), np.int32)

    def crop(self, canvas: Int32[np.ndarray, "rows 4 columns 4"]) -> Int32[np.ndarray, "H W"]:
        """The image's part of a canvas."""
        half = STRIDE // 2
        full = canvas.reshape(STRIDE * self.shape[0], STRIDE * self.shape[1])
        return np.ascontiguousarray(full[half : half + self.height, half : half + self.width])

    @staticmethod
    def _inside(count: int, length: int) -> Bool[np.ndarray, "count 4"]:
        pixels = np.arange(STRIDE * count).reshape(count, STRIDE) - STRIDE // 2
        return (pixels >= 0) & (pixels < length)


def _between(start: np.ndarray, end: np.ndarray, weight: np.ndarray) -> np.ndarray:
    result = (end - start) * weight
    result += start
    return result


def fast_class_map(
    weights: Float32[np.ndarray, "Q K"], mask_logits: Float32[np.ndarray, "Q h w"], image_size: Size
) -> Int32[np.ndarray, "H W"]:
    """The class with the highest score at every pixel; see `fast_argmax.fast_class_map`."""
    heavy, slack = _heavy_queries(weights)
    everything = Cells(mask_logits, image_size)
    cells, weights_of_heavy = everything, weights
    if not heavy.all():
        cells, weights_of_heavy = Cells(mask_logits[heavy], image_size), weights[heavy]
    canvas = cells.canvas()
    for strip in cells.strips():
        low, high = cells.bounds(strip)
        lowest, highest = _scores(low, weights_of_heavy), _scores(high, weights_of_heavy)
        highest += slack
        winner, certain = _certain_winner(lowest, highest)  # R S
        canvas[strip] = winner[:, None, :, None]
        rows, columns = np.nonzero(~certain)
        rows += strip.start
        for part, logits, inside in cells.pixels(rows, columns):
            scores = _scores(logits, weights_of_heavy)
            canvas[rows[part], :, columns[part]] = scores.argmax(-1)
            if cells is everything:  # nothing was left out
                continue
            _, certain = _certain_winner(scores, scores + slack)
            open_cells = (~certain & inside).any((1, 2))
            i, j = rows[part][open_cells], columns[part][open_cells]
            for some, all_logits, _ in everything.pixels(i, j):
                canvas[i[some], :, j[some]] = _scores(all_logits, weights).argmax(-1)
    return cells.crop(canvas)


def _scores(logits: np.ndarray, weights: Float32[np.ndarray, "Q K"]) -> np.ndarray:
    """Class scores [..., K] of logits [..., Q], which are overwritten."""
    *places, Q = logits.shape
    flat = sigmoid(logits).reshape(math.prod(places), Q)  # NumPy would multiply stacks one by one
    return (flat @ weights).reshape(*places, weights.shape[1])


def _heavy_queries(
    weights: Float32[np.ndarray, "Q K"],
) -> tuple[Bool[np.ndarray, " Q"], Float32[np.ndarray, " K"]]:
    """The queries to compute first, and how much the others can add to each class at most."""
    order = weights.max(1).argsort(kind="stable")
    total = weights[order].cumsum(0)  # Q K
    light = order[total.max(1) < SLACK]
    if len(light) < len(weights) / 4:  # too few to be worth a second look
        light = light[:0]
    heavy = np.ones(len(weights), bool)
    heavy[light] = False
    return heavy, weights[light].sum(0)


def fast_winner_map(
    mask_logits: Float32[np.ndarray, "Q h w"], scores: Float32[np.ndarray, " Q"], image_size: Size
) -> tuple[Int32[np.ndarray, "H W"], Int64[np.ndarray, "Q 3"]]:
    """The query with the highest score times mask probability, and areas; see `fast_argmax.fast_winner_map`."""
    Q = len(mask_logits)
    cells = Cells(mask_logits, image_size)
    canvas = cells.canvas()
    areas = np.zeros((Q, 3), np.int64)
    for strip in cells.strips():
        low, high = cells.bounds(strip)
        full, crossed = low >= 0, ((low < 0) & (high > -MARGIN)).any(-1)
        winner, certain = _certain_winner(sigmoid(low) * scores, sigmoid(high) * scores)  # R S
        decided = certain & ~crossed
        visible = np.take_along_axis(full, winner[..., None], -1)[..., 0]
        canvas[strip] = np.where(visible, winner, Q)[:, None, :, None]
        rows, columns = np.nonzero(~decided)
        _count(areas, winner, visible, full, cells.areas(strip) * decided)
        rows += strip.start
        for part, logits, inside in cells.pixels(rows, columns):
            probability = sigmoid(logits)
            own = probability >= 0.5  # not `logit >= 0`: a slightly negative logit rounds to 0.5
            winner = (probability * scores).argmax(-1)
            visible = np.take_along_axis(own, winner[..., None], -1)[..., 0]
            canvas[rows[part], :, columns[part]] = np.where(visible, winner, Q)
            _count(areas, winner, visible, own, inside)
    return cells.crop(canvas), areas


def _certain_winner(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The highest lower bound [..., Q], and whether it is above all others' upper bounds. Overwrites `high`."""
    winner = low.argmax(-1)
    best = np.take_along_axis(low, winner[..., None], -1)[..., 0]
    np.put_along_axis(high, winner[..., None], -1.0, -1)
    return winner, best > high.max(-1) * np.float32(1 + MARGIN) + np.float32(MARGIN * MARGIN)


def _count(
    areas: Int64[np.ndarray, "Q 3"], winner: np.ndarray, visible: np.ndarray, own: np.ndarray, pixels: np.ndarray
) -> None:
    """Add pixels won, pixels in the own mask and pixels of both to the areas of every query."""
    Q = len(areas)
    counted = pixels.ravel().astype(np.float32)
    won = np.bincount((winner * 2 + visible).ravel(), counted, minlength=2 * Q).reshape(Q, 2)
    areas[:, 0] += won.sum(1).astype(np.int64)
    areas[:, 1] += np.rint(counted @ own.reshape(-1, Q).astype(np.float32)).astype(np.int64)
    areas[:, 2] += won[:, 1].astype(np.int64)
