"""What is wrong with a data set, found before training; every finding names its cure.

`scripts/check_data.py` reads every file once, a training by itself a sample of them.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only

from pem_lightning.data.ade20k import ADE20K, DOWNLOAD, ADE20KDataset
from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import SegmentationDataset, exif_orientation, first_problem, map_parallel, read_map
from pem_lightning.data.semantic_folder import SemanticFolderDataset
from pem_lightning.installation import tool_command
from pem_lightning.types import IGNORE_INDEX, VOID_ID, DatasetInfo, Sample, Task, UserError

log = logging.getLogger(__name__)

SAMPLE = {"train": (64, 1.2), "val": (16, 0.4)}
"""By split: how many images the quick check reads at most, and after how many seconds it begins no other one."""
_SHOWN = 5
"""So many findings of one split are logged at the start of a training."""


@dataclass
class SplitCheck:
    """What a split holds; counters are by class index, and segments without pixels do not count.

    Attributes:
        images: in the split; `read` of them were looked at.
        problems: one message with file and cure each.
        notes: what is unusual, but may be meant.
        unreadable: those of `problems` that name a file which cannot be read.
        pointless: that of `problems` which says why there is nothing to learn, or empty.
        total_pixels: void included.
        segments: crowds included.
        images_with: images that hold the class.
        gallery: indices of a few items that together show as many classes as possible.
    """

    split: str
    info: DatasetInfo
    images: int = 0
    read: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pointless: str = ""
    total_pixels: int = 0
    pixels: Counter[int] = field(default_factory=Counter)
    segments: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    images_with: Counter[int] = field(default_factory=Counter)
    gallery: list[int] = field(default_factory=list)

    @property
    def absent(self) -> list[str]:
        """Names of the classes that no image has."""
        return [name for k, name in enumerate(self.info.class_names) if not self.images_with[k]]

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


class _Item(NamedTuple):
    """What one item holds: `values` are `_annotation_values`, `targets` the segments that a task trains on."""

    counts: SplitCheck
    values: Counter[int]
    targets: int = 0
    maybe_turned: bool = False  # upright or not? its EXIF orientation leaves the annotation's size as it is


def check_split(
    dataset: SegmentationDataset,
    split: str,
    workers: int = 0,
    gallery: int = 12,
    *,
    task: Task = "panoptic",
    num_queries: int | None = None,
) -> SplitCheck:
    """Read every item of a data set, which should be made with `on_error="collect"`, and judge the whole.

    Args:
        workers: reading processes; 0 reads in this one.
        gallery: number of items to choose for pictures.
        task: that is to be trained.
        num_queries: of the network; None if it is not known.
    """
    indices = range(len(dataset))
    check = partial(_check_item, dataset, task=task)
    items: list[_Item] = list(map_parallel(check, indices, workers, f"Checking {split}"))
    result = _judge(dataset, split, indices, items, task, num_queries)
    result.gallery = _covering([item.counts.pixels.keys() for item in items], gallery)
    return result


@rank_zero_only
def check_before_training(datamodule: SegmentationDataModule, check: bool | str, num_queries: int | None) -> None:
    """Look for what would make a training fail or learn nothing, and log what may be wrong. Draws no random numbers.

    Args:
        datamodule: its files are written if they have to be.
        check: `dataset.check`. True reads a sample that is spread over the data set, "full" everything.
        num_queries: of the network; None if it is not known.

    Raises:
        UserError: an item cannot be read, and `dataset.on_error` is not "skip"; or there is nothing to learn.
    """
    if check not in (True, False, "full"):
        raise UserError(f"dataset.check={check}: choose true, false or full")
    if check is False:
        return
    datamodule.prepare_data()
    results = []
    for split, limits in SAMPLE.items():
        if datamodule.cache is None:
            dataset = datamodule.train_dataset if split == "train" else datamodule.val_dataset
        else:  # the copies are made later, by all processes together
            dataset = datamodule.make_dataset(split, None)
        if check == "full":
            result = check_split(
                dataset, split, datamodule.num_workers, 0, task=datamodule.task, num_queries=num_queries
            )
        else:
            result = _check_sample(dataset, split, *limits, datamodule.task, num_queries)
        if result.unreadable and datamodule.on_error != "skip":
            raise UserError(first_problem(result.problems))
        if result.pointless:
            raise UserError(f"{result.pointless} (dataset.check=false trains all the same)")
        results.append(result)
    for result in results:
        _log(result)


def _log(result: SplitCheck) -> None:
    if result.split == "train" and result.read < result.images and result.absent:
        few = f"in {result.read} of {result.images} training images that were looked at"
        log.info("%d of %d classes do not occur %s", len(result.absent), result.info.num_classes, few)
    findings = result.problems + result.notes
    for finding in findings[:_SHOWN]:
        log.warning("%s", finding)
    if len(findings) > _SHOWN:
        log.warning(
            "%s: %d more such findings, %s lists all", result.split, len(findings) - _SHOWN, tool_command("check_data")
        )


def _check_sample(
    dataset: SegmentationDataset, split: str, most: int, seconds: float, task: Task, num_queries: int | None
) -> SplitCheck:
    """The same as `check_split` for some items, within some seconds."""
    deadline = time.monotonic() + seconds
    indices: list[int] = []
    items: list[_Item] = []
    for index in _spread(len(dataset), most):
        indices.append(index)
        items.append(_check_item(dataset, index, task))
        if time.monotonic() > deadline:
            break
    return _judge(dataset, split, indices, items, task, num_queries)


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of `count` positions, in an order of which every beginning is spread over all."""
    chosen = min(count, most)
    # Multiples of an irrational number modulo 1 fill the interval evenly, however many they are.
    ranks = np.argsort(np.argsort(np.arange(chosen) * 0.618033988749895 % 1))
    return (ranks * count // max(chosen, 1)).tolist()


def _judge(
    dataset: SegmentationDataset,
    split: str,
    indices: Sequence[int],
    items: Sequence[_Item],
    task: Task,
    num_queries: int | None,
) -> SplitCheck:
    """What the items at some places of a data set say together."""
    result = SplitCheck(split, dataset.info, len(dataset), len(items))
    values: Counter[int] = sum((item.values for item in items), Counter())
    for item in items:
        counts = item.counts
        result.total_pixels += counts.total_pixels
        result.pixels += counts.pixels
        result.segments += counts.segments
        result.crowds += counts.crowds
        result.images_with.update(counts.pixels.keys())
        result.unreadable += counts.unreadable
    # What concerns all files first: it may explain the rest.
    folder = os.path.commonpath([dataset.files(i)[-1].parent for i in (0, len(dataset) - 1)]) if dataset else ""
    part = f", {len(items)} of {len(dataset)} images read" if len(items) < len(dataset) else ""
    place = f"{split} ({folder}{part})"
    result.problems += [f"{place}: {suspicion}" for suspicion in suspicions(dataset, values)]
    if dataset.on_error == "collect":  # otherwise they were raised or logged
        result.problems += dataset.problems
    result.problems += result.unreadable + [problem for item in items for problem in item.counts.problems]
    remarks = Counter(remark for item in items for remark in item.counts.notes)
    result.notes += [f"{place}: {times} image(s) have {remark}" for remark, times in remarks.items()]
    if result.total_pixels:
        _judge_classes(result, place, task, _void_255(dataset, values, result.absent))
    named = [(dataset.names[index], item) for index, item in zip(indices, items, strict=True)]
    if empty := [name for name, item in named if item.counts.total_pixels and not item.counts.pixels]:
        result.notes.append(f"{place}: {len(empty)} image(s) have no annotated pixel: {enumerated(empty)}")
    if turned := [name for name, item in named if item.maybe_turned]:
        result.notes.append(
            f"{place}: {len(turned)} image(s) are turned upright by their EXIF orientation, and sizes do not tell "
            "whether their annotation is upright, too: look at their overlays; if it is not, turn it in the same way, "
            f"or remove that tag from the images (exiftool -Orientation=): {enumerated(turned)}"
        )
    if crowded := {name: item.targets for name, item in named if num_queries and item.targets > num_queries}:
        largest = max(crowded, key=crowded.__getitem__)
        result.notes.append(
            f"{place}: {len(crowded)} image(s) have more segments than num_queries={num_queries}, up to "
            f"{crowded[largest]} ({largest}), and a query finds one segment: raise num_queries"
        )
    return result


def _judge_classes(result: SplitCheck, place: str, task: Task, void: str) -> None:
    """Which classes never occur, and whether the others leave anything to learn."""
    complete, absent = result.read == result.images, result.absent
    missing = f"{len(absent)} of {result.info.num_classes} classes never occur: {enumerated(absent, 20)}; "
    if result.split != "train":
        if absent and complete:
            result.notes.append(f"{place}: {missing}they do not count in its metrics")
        return
    nothing = _nothing_to_learn(result, task)
    if nothing and (complete or void):
        result.pointless = f"{place}: {missing if absent else ''}{nothing}{void}"
        result.problems.append(result.pointless)
    elif absent and (complete or nothing):
        hint = "no model can learn them: check that the labels use the ids of the class list, or shorten it"
        result.problems.append(f"{place}: {missing}{nothing or hint}{void}")


def _nothing_to_learn(result: SplitCheck, task: Task) -> str:
    """Why a training would be pointless, and what to do; empty if it would not be."""
    present = [entry for k, entry in enumerate(result.info.classes) if result.images_with[k]]
    if not present:
        return "nothing is annotated: check that the labels use the ids of the class list"
    if task == "instance" and not any(entry.is_thing for entry in present):
        return "no class that occurs is countable, and task=instance learns no other: choose another task"
    if len(present) > 1 or (present[0].is_thing and task != "semantic"):
        return ""
    if result.info.num_classes == 1:
        return (
            f"{present[0].name} is the only class, and with one class every pixel is that class: add a background class"
        )
    return f"every annotated pixel is {present[0].name}: check that the labels use the ids of the class list"


def _void_255(dataset: SegmentationDataset, values: Counter[int], absent: Sequence[str]) -> str:
    """A hint at masks of 0 and 255, where 255 is void but may be meant to be a class that never occurs."""
    if not (isinstance(dataset, SemanticFolderDataset) and IGNORE_INDEX in dataset.void and values[IGNORE_INDEX]):
        return ""
    meant = f"{absent[0]}, write {{name: {absent[0]}, id: 255}}" if absent else "a class, give that one id: 255"
    return f"; {_shares(values, [IGNORE_INDEX])}and is void: if it means {meant} in classes.yaml"


def _check_item(dataset: SegmentationDataset, index: int, task: Task) -> _Item:
    result, values = SplitCheck("", dataset.info), _annotation_values(dataset, index)
    try:
        sample = dataset.read(index)
    except UserError as error:
        result.unreadable.append(str(error))
        return _Item(result, values)
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
    turn, (height, width) = exif_orientation(dataset.files(index)[0]), sample.image.shape[1:]
    maybe_turned = turn in (2, 3, 4) or (turn > 4 and height == width)  # otherwise the sizes would not fit
    return _Item(result, values, _num_targets(sample, areas, task), maybe_turned)


def _num_targets(sample: Sample, areas: Counter[int], task: Task) -> int:
    """How many segments `build_target` makes of a sample."""
    if task == "semantic":
        return len({segment.class_id for segment in sample.segments if areas[segment.id]})
    return sum(not s.is_crowd and (s.is_thing or task == "panoptic") for s in sample.segments)


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
