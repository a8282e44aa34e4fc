"""Images of any size in bounded memory: overlapping tiles run through the network one by one, and are joined.

Semantic: class scores are blended; towards its border a tile counts less (a sin^2 window over the overlap). A pixel's
class is decided as soon as no later tile can change it, so that no more scores than those of an overlap are held.

Panoptic and instances: every pixel is taken from the tile whose middle is nearer. Two things of neighbouring tiles are
the same object if they have the same class and an IoU above `SAME_OBJECT` among the pixels that both tiles show. Things
that merely touch share no pixels there. Each thing of a tile is joined to at most one of another tile. All stuff of a
class is one segment. What is joined has the mean score of its parts, weighted by their areas.

A tile's place is given in pixels of the network's input; results have the output's size, which may be another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int32, Int64, UInt8
from pycocotools import mask as coco_mask
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pem_lightning.inference.postprocess import Instance, Result, Size, size_of
from pem_lightning.inference.tta import Network, TestTimeAugmentation
from pem_lightning.preprocess import normalize
from pem_lightning.types import VOID_ID, Segment, UserError

SMALLEST_TILE = 64
SAME_OBJECT = 0.5
"""Things of two tiles are one object if their IoU is above this; then no other thing of a panoptic map can be."""
SURE = 0.5
"""Instances of at least this score are kept, however many there are."""

Area = tuple[slice, slice]
"""Rows and columns of the output."""


class TiledInference:
    """Network and post-processing of whole images: in tiles, or in one pass where one tile covers the image.

    Args:
        augmentation: what happens to a tile.
        tile: height and width of the largest part of an image that the network sees at once; None for no limit.
        overlap: pixels that neighbouring tiles share at least.

    Raises:
        UserError: the tile is too small, or its sides are not larger than the overlap.
    """

    def __init__(self, augmentation: TestTimeAugmentation, tile: Any = None, overlap: Any = 128) -> None:
        if tile is not None:
            sides = list(tile) if isinstance(tile, Sequence) and not isinstance(tile, str) else []
            if len(sides) != 2 or not all(_is_whole(side) and side >= SMALLEST_TILE for side in sides):
                raise UserError(
                    f"inference.tile={_text(tile)}: give height and width in pixels, at least {SMALLEST_TILE} each, "
                    "e.g. [1024,1024], or null for whole images"
                )
            if not _is_whole(overlap) or not 0 <= overlap < min(sides):
                raise UserError(
                    f"inference.overlap={overlap}: give a number of pixels from 0 to {min(sides) - 1}, less than both "
                    f"sides of inference.tile={_text(sides)}, e.g. {min(sides) // 8}"
                )
            tile = sides[0], sides[1]
        self.augmentation = augmentation
        self.inference = augmentation.inference
        self.tile: Size | None = tile
        self.overlap = overlap

    def __call__(
        self,
        network: Network,
        images: Sequence[UInt8[Tensor, "3 height width"]],
        output_size: Size,
        *,
        device: torch.device | None = None,
        with_semantic: bool = False,
    ) -> list[Result]:
        """Process images of one size, one by one if they need tiles.

        Args:
            network: see `TestTimeAugmentation`.
            images: RGB. Results of tiles are collected on their device.
            output_size: of the results.
            device: the network's, by default the images'.
            with_semantic: see `TaskInference`.
        """
        size = size_of(images[0])
        if self.tile is None or (size[0] <= self.tile[0] and size[1] <= self.tile[1]):
            inputs = torch.stack([normalize(image.to(device)) for image in images])
            return self.augmentation(network, inputs, output_size, with_semantic=with_semantic)
        rows, columns = (cut(*axis, self.overlap) for axis in zip(size, output_size, self.tile, strict=True))
        with_semantic = with_semantic or self.inference.task == "semantic"
        return [self._join_tiles(network, image, rows, columns, device, with_semantic) for image in images]

    def _join_tiles(
        self,
        network: Network,
        image: UInt8[Tensor, "3 height width"],
        rows: list[Cut],
        columns: list[Cut],
        device: torch.device | None,
        with_semantic: bool,
    ) -> Result:
        inference, size = self.inference, (rows[-1].used.stop, columns[-1].used.stop)
        classes = ClassMap(rows, columns, image.device) if with_semantic else None
        objects: JoinedSegments | JoinedInstances | None = None
        if inference.task == "panoptic":
            objects = JoinedSegments(size, image.device, inference.thing_classes)
        elif inference.task == "instance":
            objects = JoinedInstances(size, image.device, inference.top_k)

        def infer(i: int, j: int) -> None:  # a function, so that nothing of a tile outlives it
            row, column = rows[i], columns[j]
            inputs = normalize(image[:, row.seen, column.seen].to(device))[None]
            shown = row.shown.stop - row.shown.start, column.shown.stop - column.shown.start
            rows_used, columns_used = used = _within((row.used, column.used), (row.shown, column.shown))
            if objects is None:
                (scores,) = self.augmentation.scores(network, inputs, shown)
            else:
                predictions = network(inputs)
                result = inference(predictions, size_of(inputs), shown)
                objects.add(result, used, (row.used, column.used), (row.own, column.own))
                if classes is not None:
                    scores = inference.scores(predictions, size_of(inputs), shown)
            if classes is not None:
                classes.add(scores[:, rows_used, columns_used], i, j)

        for i in range(len(rows)):
            for j in range(len(columns)):
                infer(i, j)
        result = Result() if objects is None else objects.finish()
        return result if classes is None else result._replace(semantic=classes.map)


class Cut(NamedTuple):
    """A tile's place along one axis."""

    seen: slice  # by the network, in pixels of its input
    shown: slice  # the same in pixels of the output, as are the following
    used: slice  # no more than the overlap beyond `own`: further out, neighbours know better
    own: slice  # the pixels that are nearer to this tile's middle than to any other's
    weight: Float[Tensor, " used"]


def cut(length: int, output: int, tile: int, overlap: int) -> list[Cut]:
    """Cut an axis of `length` pixels, `output` in the result, into evenly spread tiles, as few as overlap enough."""
    tile = min(tile, length)
    count = 1 if tile == length else math.ceil((length - overlap) / (tile - overlap))
    starts = [i * (length - tile) // max(count - 1, 1) for i in range(count)]
    seams = [(a + b + tile - overlap) // 2 for a, b in pairwise(starts)]  # where what two neighbours blend begins

    def place(pixels: int) -> int:
        return round(pixels * output / length)

    firsts = [0, *(place(seam) for seam in seams)]
    lasts = [*(place(seam + overlap) for seam in seams), output]
    middles = [0, *(place(seam + overlap // 2) for seam in seams), output]
    cuts = []
    for i, start in enumerate(starts):
        weight = torch.ones(lasts[i] - firsts[i])
        if i > 0:
            rise = _rise(lasts[i - 1] - firsts[i])
            weight[: len(rise)] *= rise
        if i < count - 1:
            fall = _rise(lasts[i] - firsts[i + 1]).flip(0)
            weight[len(weight) - len(fall) :] *= fall
        seen, used = slice(start, start + tile), slice(firsts[i], lasts[i])
        shown = slice(place(seen.start), place(seen.stop))
        cuts.append(Cut(seen, shown, used, slice(middles[i], middles[i + 1]), weight))
    return cuts


def _rise(pixels: int) -> Float[Tensor, " pixels"]:
    """From 0 to 1, both excluded; it and its mirror image add up to 1."""
    return torch.sin((torch.arange(pixels) + 0.5) * (math.pi / 2 / max(pixels, 1))) ** 2


class ClassMap:
    """The class map of an image, from the scores of its tiles, row by row of tiles and in each from left to right.

    Scores wait in two places for tiles that may still change them: what the next tile of the row shows, too, and what
    the next row of tiles shows.
    """

    def __init__(self, rows: list[Cut], columns: list[Cut], device: torch.device) -> None:
        self.rows, self.columns = rows, columns
        size = rows[-1].used.stop, columns[-1].used.stop
        self.map: Int32[Tensor, "H W"] = torch.empty(size, dtype=torch.int32, device=device)
        self.right: Float[Tensor, "K R C"] | None = None
        self.above: Float[Tensor, "K R W"] | None = None
        self.below: Float[Tensor, "K R W"] | None = None

    def add(self, scores: Float[Tensor, "K R C"], i: int, j: int) -> None:
        """Take the scores of what a tile uses; they are overwritten. The scale of a pixel's scores does not matter."""
        row, column = self.rows[i], self.columns[j]
        weight = row.weight[:, None] * column.weight
        scores = scores.mul_(weight.to(scores)).to(self.map.device)
        bottom = _next_start(self.rows, i) - row.used.start  # from here on, other tiles have a say
        right = _next_start(self.columns, j) - column.used.start
        if j == 0:
            waiting = scores.shape[0], scores.shape[1] - bottom, self.map.shape[1]
            self.above, self.below, self.right = self.below, scores.new_empty(waiting), None
        if self.right is not None:
            scores[:, :, : self.right.shape[2]] += self.right
        self.right = scores[:, :, right:].clone()
        scores, at = scores[:, :, :right], slice(column.used.start, column.used.start + right)
        if self.above is not None:
            scores[:, : self.above.shape[1]] += self.above[:, :, at]
        assert self.below is not None
        self.below[:, :, at] = scores[:, bottom:]
        self.map[row.used.start : row.used.start + bottom, at] = scores[:, :bottom].argmax(0).int()


def _next_start(cuts: list[Cut], i: int) -> int:
    """Where the next tile begins to count; the end of the last one."""
    return cuts[i + 1].used.start if i + 1 < len(cuts) else cuts[i].used.stop


class _Tile(NamedTuple):
    """What a tile found, for comparison with its neighbours."""

    used: Area
    first: int  # number of its first part
    classes: Int64[Tensor, " parts"]
    scores: Float[Tensor, " parts"]
    masks: Callable[[Area], Bool[Tensor, "parts R C"]]  # a piece of them


class _Parts:
    """Parts of objects, tile by tile, and which of them are the same object."""

    def __init__(self) -> None:
        self.classes: list[int] = []
        self.scores: list[float] = []
        self.areas: list[int] = []  # in the tile's own pixels
        self.pairs: list[tuple[int, int]] = []
        self.tiles: list[_Tile] = []  # that the next one may overlap

    def add(
        self,
        classes: list[int],
        scores: list[float],
        areas: list[int],
        used: Area,
        masks: Callable[[Area], Bool[Tensor, "parts R C"]],
    ) -> None:
        """Take a tile's parts."""
        tile = _Tile(used, len(self.classes), torch.tensor(classes), torch.tensor(scores), masks)
        self.classes += classes
        self.scores += scores
        self.areas += areas
        self.tiles = [other for other in self.tiles if other.used[0].stop > used[0].start]
        if classes:
            for other in self.tiles:
                self._compare(other, tile)
            self.tiles.append(tile)

    def _compare(self, one: _Tile, other: _Tile) -> None:
        rows, columns = (_common(a, b) for a, b in zip(one.used, other.used, strict=True))
        if rows.start >= rows.stop or columns.start >= columns.stop:
            return
        a, b = (tile.masks((rows, columns)).flatten(1).float() for tile in (one, other))
        shared = a @ b.T
        iou = (shared / (a.sum(1)[:, None] + b.sum(1) - shared).clamp(min=1)).cpu()
        iou[(iou <= SAME_OBJECT) | (one.classes[:, None] != other.classes)] = 0
        # Instances may be found twice; then the more certain ones are preferred.
        value = iou * one.scores[:, None] * other.scores
        for i, j in zip(*linear_sum_assignment(value.numpy(), maximize=True), strict=True):
            if iou[i, j] > 0:
                self.pairs.append((one.first + int(i), other.first + int(j)))

    def objects(self) -> list[tuple[list[int], float]]:
        """The numbers of each object's parts, and its score; without objects that have no pixel."""
        count = len(self.classes)
        first, second = np.array(self.pairs, np.int64).reshape(-1, 2).T
        graph = coo_array((np.ones(len(first), bool), (first, second)), shape=(count, count))
        members: dict[int, list[int]] = {}
        for part, label in enumerate(connected_components(graph, directed=False)[1].tolist() if count else ()):
            members.setdefault(label, []).append(part)
        objects = []
        for parts in members.values():
            area = sum(self.areas[p] for p in parts)
            if area > 0:
                objects.append((parts, sum(self.areas[p] * self.scores[p] for p in parts) / area))
        return objects


class JoinedSegments:
    """The panoptic map of an image, from those of its tiles."""

    def __init__(self, size: Size, device: torch.device, thing_classes: Collection[int]) -> None:
        self.thing_classes = thing_classes
        self.map = torch.full(size, VOID_ID, dtype=torch.int32, device=device)  # of numbers of parts, from 1
        self.parts = _Parts()
        self.stuff: dict[int, int] = {}  # class -> its first part

    def add(self, result: Result, shown: Area, used: Area, own: Area) -> None:
        """Take a tile's result, which is used at `shown`."""
        assert result.panoptic is not None
        first, segments = len(self.parts.classes), result.segments
        table = torch.zeros(1 + max((s.id for s in segments), default=0), dtype=torch.int32)
        table[[s.id for s in segments]] = torch.arange(len(segments), dtype=torch.int32) + 1
        tile = table.to(self.map.device)[result.panoptic[shown].to(self.map.device)]
        mine = tile[_within(own, used)]
        self.map[own] = torch.where(mine > 0, mine + first, VOID_ID)
        numbers = torch.arange(len(segments), device=tile.device)[:, None, None] + 1
        self.parts.add(
            [s.class_id for s in segments],
            [1.0 if s.score is None else s.score for s in segments],
            mine.flatten().bincount(minlength=len(segments) + 1)[1:].tolist(),
            used,
            lambda area: tile[_within(area, used)] == numbers,
        )
        for part, segment in enumerate(segments, first):
            if not segment.is_thing:
                self.parts.pairs.append((self.stuff.setdefault(segment.class_id, part), part))

    def finish(self) -> Result:
        """The map with ids 1, 2, ... in the order of the tiles, and its segments."""
        table = torch.full((len(self.parts.classes) + 1,), VOID_ID, dtype=torch.int32)
        segments = []
        for segment_id, (parts, score) in enumerate(self.parts.objects(), 1):
            table[torch.tensor(parts) + 1] = segment_id
            class_id = self.parts.classes[parts[0]]
            segments.append(Segment(segment_id, class_id, class_id in self.thing_classes, score=score))
        table = table.to(self.map.device)
        for rows in self.map.split(256):  # in place, without another map
            rows.copy_(table[rows])
        return Result(panoptic=self.map, segments=tuple(segments))


class _Mask(NamedTuple):
    """A part of an instance, as run lengths."""

    runs: dict[str, Any]  # of what the tile uses
    used: Area
    own: Area


class JoinedInstances:
    """The instances of an image, from those of its tiles."""

    def __init__(self, size: Size, device: torch.device, top_k: int) -> None:
        self.size, self.device, self.top_k = size, device, top_k
        self.parts = _Parts()
        self.masks: list[_Mask] = []

    def add(self, result: Result, shown: Area, used: Area, own: Area) -> None:
        """Take a tile's result, which is used at `shown`."""
        found, areas, runs = [], [], []
        for instance in result.instances:
            mask = instance.mask[shown].cpu().numpy()
            if mask.any():
                found.append(instance)
                areas.append(int(mask[_within(own, used)].sum()))
                runs.append(coco_mask.encode(np.asfortranarray(mask.view(np.uint8))))
        self.masks += [_Mask(one, used, own) for one in runs]

        def masks_at(area: Area) -> Bool[Tensor, "parts R C"]:
            return torch.from_numpy(coco_mask.decode(runs)[_within(area, used)]).permute(2, 0, 1).bool()

        self.parts.add([i.class_id for i in found], [i.score for i in found], areas, used, masks_at)

    def finish(self) -> Result:
        """Instances by falling score: the `top_k` best, and all that are `SURE`."""
        objects = sorted(self.parts.objects(), key=lambda one: -one[1])
        kept = [one for number, one in enumerate(objects) if number < self.top_k or one[1] >= SURE]
        return Result(instances=tuple(self._instance(parts, score) for parts, score in kept))

    def _instance(self, parts: list[int], score: float) -> Instance:
        whole = np.zeros(self.size, bool)  # on Linux, pages that nothing is written to take no memory
        for runs, used, own in (self.masks[part] for part in parts):
            whole[own] |= coco_mask.decode(runs)[_within(own, used)].astype(bool)
        return Instance(torch.from_numpy(whole).to(self.device), self.parts.classes[parts[0]], score)


def _within(inner: Area, outer: Area) -> Area:
    """A part of an area, counted from the area's corner."""
    rows, columns = (slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
    return rows, columns


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _is_whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _text(value: Any) -> str:
    """As the command line has it."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
