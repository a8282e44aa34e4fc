"""What is wrong with a data set, found before training: every file is read once, every finding names its cure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from pem_lightning.data.ade20k import ADE20K, DOWNLOAD, ADE20KDataset
from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.dataset import SegmentationDataset, map_parallel, read_map
from pem_lightning.data.semantic_folder import SemanticFolderDataset
from pem_lightning.types import VOID_ID, DatasetInfo, UserError


@dataclass
class SplitCheck:
    """What a split holds; counters are by class index, and segments without pixels do not count.

    Attributes:
        problems: one message with file and cure each.
        notes: what is unusual, but may be meant.
        total_pixels: void included.
        segments: crowds included.
        images_with: images that hold the class.
        gallery: indices of a few items that together show as many classes as possible.
    """

    split: str
    info: DatasetInfo
    images: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    total_pixels: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    segments: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    images_with: Counter[int] = field(default_factory=Counter)
    gallery: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As the report is written."""
        classes = [
            {
                "name": name,
                "pixels": self.pixels[k],
                "share": self.pixels[k] / max(self.total_pixels, 1),
                "segments": self.segments[k],
                "crowds": self.crowds[k],
                "images": self.images_with[k],
            }
            for k, name in enumerate(self.info.class_names)
        ]
        void_share = 1 - self.pixels.total() / self.total_pixels if self.total_pixels else None
        facts = {"images": self.images, "problems": self.problems, "notes": self.notes}
        return {**facts, "void_share": void_share, "classes": classes}


def check_split(dataset: SegmentationDataset, split: str, workers: int = 0, gallery: int = 12) -> SplitCheck:
    """Read every item of a data set that was made with `on_error="collect"`, and judge the whole."""
    result = SplitCheck(split, dataset.info, len(dataset))
    indices = range(len(dataset))
    checked = list(map_parallel(partial(_check_item, dataset), indices, workers, f"Checking {split}"))
    items: list[SplitCheck] = [item for item, _ in checked]
    values: Counter[int] = sum((found for _, found in checked), Counter())
    for item in items:
        result.total_pixels += item.total_pixels
        result.pixels += item.pixels
        result.segments += item.segments
        result.crowds += item.crowds
        result.images_with.update(item.pixels.keys())
    # What concerns all files first: it may explain the rest.
    folder = os.path.commonpath([dataset.files(i)[-1].parent for i in (0, len(dataset) - 1)]) if dataset else ""
    place = f"{split} ({folder})"
    result.problems += [f"{place}: {suspicion}" for suspicion in suspicions(dataset, values)]
    result.problems += dataset.problems + [problem for item in items for problem in item.problems]
    remarks = Counter(remark for item in items for remark in item.notes)
    result.notes += [f"{place}: {times} image(s) have {remark}" for remark, times in remarks.items()]
    absent = [name for k, name in enumerate(dataset.info.class_names) if not result.images_with[k]]
    if result.total_pixels and absent:
        message = f"{place}: {len(absent)} of {dataset.info.num_classes} classes never occur: {enumerated(absent, 20)}"
        if split == "train":
            hint = "check that the labels use the ids of the class list, or shorten it"
            result.problems.append(f"{message}; no model can learn them: {hint}")
        else:
            result.notes.append(f"{message}; they do not count in its metrics")
    if empty := [dataset.names[i] for i, item in enumerate(items) if item.total_pixels and not item.pixels]:
        result.notes.append(f"{place}: {len(empty)} image(s) have no annotated pixel: {enumerated(empty)}")
    result.gallery = _covering([item.pixels.keys() for item in items], gallery)
    return result


def _check_item(dataset: SegmentationDataset, index: int) -> tuple[SplitCheck, Counter[int]]:
    """What one item holds, and `_annotation_values`."""
    result, values = SplitCheck("", dataset.info), _annotation_values(dataset, index)
    try:
        sample = dataset.read(index)
    except UserError as error:
        result.problems.append(str(error))
        return result, values
    result.notes += dataset.remarks(index)
    areas = _counts(sample.panoptic.numpy())
    hidden = [
        f"number {number} ({dataset.info.classes[segment.class_id].name})"
        for number, segment in enumerate(sample.segments, start=1)
        if not areas[segment.id]
    ]
    if hidden and dataset.info.name != ADE20K.name:  # there some instances are covered completely by others
        result.problems.append(
            f"{dataset.files(index)[-1]} has no pixels for {len(hidden)} of its {len(sample.segments)} listed "
            f"segments, {enumerated(hidden)}: write map and list anew from one source, or take them out of the list"
        )
    result.total_pixels = sample.panoptic.numel()
    for segment in sample.segments:
        if areas[segment.id]:
            result.pixels[segment.class_id] += areas[segment.id]
            result.segments[segment.class_id] += 1
            result.crowds[segment.class_id] += segment.is_crowd
    return result, values


def _counts(values: np.ndarray) -> Counter[int]:
    counts = np.bincount(values.ravel())
    present = counts.nonzero()[0]
    return Counter(dict(zip(present.tolist(), counts[present].tolist(), strict=True)))


def _covering(classes: Sequence[Iterable[int]], count: int) -> list[int]:
    """Up to `count` positions that show many classes: each adds the most that are still missing, then evenly spread."""
    sets = [set(c) for c in classes]
    chosen: list[int] = []
    seen: set[int] = set()
    while len(chosen) < count:
        best = max(range(len(sets)), key=lambda i: len(sets[i] - seen), default=None)
        if best is None or not sets[best] - seen:
            break
        chosen.append(best)
        seen |= sets[best]
    rest = [i for i, present in enumerate(sets) if present and i not in chosen]
    missing = min(count - len(chosen), len(rest))
    return sorted(chosen + [rest[i * len(rest) // missing] for i in range(missing)])


def enumerated(values: Sequence[Any], many: int = 5) -> str:
    """Some values as text, and how many more there are."""
    more = f" and {len(values) - many} more" if len(values) > many else ""
    return ", ".join(str(value) for value in values[:many]) + more


# Maps of another kind than the data set's, told by the values of a whole split.

_MANY_TRAIN_IDS = 10
"""Of Cityscapes' 19 train ids. Label ids below 19 are mostly void or rare: true maps never hold so many alone."""


def _annotation_values(dataset: SegmentationDataset, index: int) -> Counter[int]:
    """Pixels by value of an item's annotation file; empty where `suspicions` has no rule or it cannot be read."""
    annotation = dataset.files(index)[1:]
    if not annotation or not isinstance(dataset, CityscapesDataset | ADE20KDataset | SemanticFolderDataset):
        return Counter()
    try:
        values = read_map(annotation[-1], "")
    except UserError:
        return Counter()  # reading the sample reports it
    return _counts(values) if values.ndim == 2 else Counter()


def suspicions(dataset: SegmentationDataset, values: Counter[int]) -> list[str]:
    """What the values of all annotation files together (pixels by value) give away, with the evidence and the cure."""
    if not values:
        return []
    if isinstance(dataset, CityscapesDataset):
        return _train_or_label_ids(values)
    if isinstance(dataset, SemanticFolderDataset):
        defined = {*dataset.info.category_ids, *dataset.void}
        return shifted_by_one(values, defined, "correct the maps, or the ids in classes.yaml")
    return shifted_by_one(values, {VOID_ID, *dataset.info.category_ids}, DOWNLOAD)


def _train_or_label_ids(values: Counter[int]) -> list[str]:
    """Train ids 0..18 with 255 for void, or label ids, where `instanceIds` maps are expected."""
    cure = "give the *_gtFine_instanceIds.png of gtFine_trainvaltest.zip"
    things = [value for value in values if 24 <= value <= 33]
    if max(values.keys() - {255}, default=0) <= 18 and (255 in values or len(values) >= _MANY_TRAIN_IDS):
        return [
            f"the annotation maps seem to hold train ids instead of instanceIds (suspicion: {_shares(values, [255])}"
            f"no other value is above 18, where single things have ids from 24000 on): {cure}"
        ]
    if things and max(values) < 1000:
        return [
            f"the annotation maps seem to hold labelIds instead of instanceIds (suspicion: {_shares(values, things)}"
            "but no thing is numbered, by values from 24000 on): all things would count as crowds and not be learnt; "
            f"{cure}"
        ]
    return []


def shifted_by_one(values: Counter[int], defined: Collection[int], hint: str) -> list[str]:
    """Class values that were moved up or down by one before; `defined` are all of the format, void included.

    Moving down turns 0 into 255 in a byte and leaves the highest value unused; moving up does the reverse.
    """
    lowest, highest = min(defined), max(set(defined) - {255})
    for way, present, absent in (("down", 255, highest), ("up", highest + 1, lowest)):
        if present in values and present not in defined and absent not in values:
            evidence = f"{_shares(values, [present])}which the format does not define, and {absent} never occurs"
            return [f"the label maps seem shifted {way} by one (suspicion: {evidence}): {hint}"]
    return []


def _shares(values: Counter[int], chosen: Collection[int]) -> str:
    """'255 covers 12.3 % of all pixels, ' for the chosen values that occur."""
    present = [value for value in sorted(chosen) if values[value]]
    if not present:
        return ""
    share = sum(values[value] for value in present) / values.total()
    names = ", ".join(map(str, present[:5])) + (", ..." if len(present) > 5 else "")
    return f"{names} cover{'s' if len(present) == 1 else ''} {share:.1%} of all pixels, "
