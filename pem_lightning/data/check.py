"""What is wrong with a data set, found before training: every file is read once, every finding names its cure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from pem_lightning.data.ade20k import ADE20K, DOWNLOAD, VOID_VALUE, ADE20KDataset
from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.dataset import SegmentationDataset, read_map
from pem_lightning.data.semantic_folder import SemanticFolderDataset, read_classes
from pem_lightning.types import DatasetInfo, Sample, UserError


class ItemCheck(NamedTuple):
    """What one item holds, in plain containers that travel between processes.

    Attributes:
        problems: what is wrong with its files; if they cannot be read, nothing else is known.
        total_pixels: void included; 0 if the files cannot be read.
        pixels: by class index.
        segments: with pixels, by class index, crowds included.
        crowds: by class index.
        values: pixels by value of its annotation file, where a suspicion is judged by them.
    """

    problems: tuple[str, ...]
    total_pixels: int
    pixels: Counter[int]
    segments: Counter[int]
    crowds: Counter[int]
    values: Counter[int]


@dataclass
class SplitCheck:
    """What a whole split holds.

    Attributes:
        split: "train" or "val".
        info: its classes.
        images: how many were found.
        problems: one message with file and cure each.
        notes: what is unusual, but may be meant.
        pixels: by class index, counted over all readable images like `segments`, `crowds` and `images_with`.
        total_pixels: void included.
        images_with: images that hold a class, by class index.
        gallery: indices of a few items that together show as many classes as possible.
    """

    split: str
    info: DatasetInfo
    images: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pixels: Counter[int] = field(default_factory=Counter)
    total_pixels: int = 0
    segments: Counter[int] = field(default_factory=Counter)
    crowds: Counter[int] = field(default_factory=Counter)
    images_with: Counter[int] = field(default_factory=Counter)
    gallery: list[int] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, as the report is written."""
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
        return {
            "images": self.images,
            "problems": self.problems,
            "notes": self.notes,
            "void_share": void_share,
            "classes": classes,
        }


def check_split(dataset: SegmentationDataset, split: str, workers: int = 0, shown: int = 12) -> SplitCheck:
    """Read every item of a split and judge the whole; shows a progress bar.

    Args:
        dataset: made with `on_error="collect"`.
        split: its name.
        workers: reading processes; 0 reads in this one.
        shown: how many items are chosen for the gallery.
    """
    loader = DataLoader(_Checks(dataset), batch_size=None, num_workers=workers, collate_fn=_unchanged)
    items = list(track(loader, f"Checking {split}", len(dataset), transient=True))
    result = SplitCheck(split, dataset.info, len(dataset))
    for item in items:
        result.pixels += item.pixels
        result.segments += item.segments
        result.crowds += item.crowds
        result.images_with.update(item.pixels.keys())
        result.total_pixels += item.total_pixels
    # What concerns all files first: it may explain the rest.
    values = sum((item.values for item in items), Counter[int]())
    place = f"{split} ({_annotation_folder(dataset)})"
    result.problems += [f"{place}: {suspicion}" for suspicion in suspicions(dataset, values)]
    result.problems += dataset.problems + [problem for item in items for problem in item.problems]
    if result.total_pixels:
        _judge_classes(result, place)
    if empty := [dataset.names[i] for i, item in enumerate(items) if item.total_pixels and not item.pixels]:
        result.notes.append(f"{place}: {len(empty)} image(s) have no annotated pixel: {enumerated(empty)}")
    result.gallery = _covering([item.pixels.keys() for item in items], shown)
    return result


def check_item(dataset: SegmentationDataset, index: int) -> ItemCheck:
    """Read one item and compare its segments with its pixels."""
    values = read_values(dataset, index)
    try:
        sample = dataset.read(index)
    except UserError as error:
        return ItemCheck((str(error),), 0, Counter(), Counter(), Counter(), values)
    areas = _areas(sample.panoptic.numpy())
    visible = [segment for segment in sample.segments if segment.id in areas]
    pixels: Counter[int] = Counter()
    for segment in visible:
        pixels[segment.class_id] += areas[segment.id]
    return ItemCheck(
        tuple(_hidden_segments(dataset, index, sample, areas)),
        sample.panoptic.numel(),
        pixels,
        Counter(segment.class_id for segment in visible),
        Counter(segment.class_id for segment in visible if segment.is_crowd),
        values,
    )


class _Checks(Dataset[ItemCheck]):
    """The items' checks as a data set, so that a loader's processes share them out."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> ItemCheck:
        return check_item(self.dataset, index)


def _unchanged(item: Any) -> Any:
    return item


def _annotation_folder(dataset: SegmentationDataset) -> str:
    """The folder that holds the annotation, or the images where there is none."""
    return os.path.commonpath([dataset.files(index)[-1].parent for index in (0, len(dataset) - 1)]) if dataset else ""


def _areas(ids: Int32[np.ndarray, "height width"]) -> dict[int, int]:
    """Pixels by id. Counting needs no sorting where the ids are small."""
    if int(ids.min()) >= 0 and int(ids.max()) < ids.size:
        counts = np.bincount(ids.ravel())
        present = counts.nonzero()[0]
        return dict(zip(present.tolist(), counts[present].tolist(), strict=True))
    present, counts = np.unique(ids, return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))


def _hidden_segments(
    dataset: SegmentationDataset, index: int, sample: Sample, areas: Mapping[int, int]
) -> Iterator[str]:
    """Segments that are listed, but have no pixels: list and map belong to different images or versions."""
    hidden = [
        f"number {number} ({dataset.info.classes[segment.class_id].name})"
        for number, segment in enumerate(sample.segments, start=1)
        if segment.id not in areas
    ]
    # ADE20K's own annotation covers some instances completely with others.
    if hidden and dataset.info.name != ADE20K.name:
        yield (
            f"{dataset.files(index)[-1]} has no pixels for {len(hidden)} of its {len(sample.segments)} listed "
            f"segments, {enumerated(hidden)}: write map and list anew from one source, or take them out of the list"
        )


def _judge_classes(result: SplitCheck, place: str) -> None:
    absent = [name for k, name in enumerate(result.info.class_names) if not result.images_with[k]]
    if not absent:
        return
    message = f"{place}: {len(absent)} of {result.info.num_classes} classes never occur: {enumerated(absent, 20)}"
    if result.split == "train":
        result.problems.append(
            f"{message}; no model can learn them: check that the labels use the ids of the class list, or shorten it"
        )
    else:
        result.notes.append(f"{message}; they do not count in its metrics")


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


_MANY_TRAIN_IDS = 10
"""Of Cityscapes' 19 train ids. Label ids below 19 are mostly void or rare: true maps never hold so many alone."""


def read_values(dataset: SegmentationDataset, index: int) -> Counter[int]:
    """Pixels by value of an item's annotation file; empty where no suspicion is judged by it or it cannot be read."""
    annotation = dataset.files(index)[1:]
    if not annotation or not isinstance(dataset, CityscapesDataset | ADE20KDataset | SemanticFolderDataset):
        return Counter()
    try:
        values = read_map(annotation[-1], "")
    except UserError:
        return Counter()  # reading the sample reports it
    if values.ndim != 2:
        return Counter()
    counts = np.bincount(values.ravel())
    present = counts.nonzero()[0]
    return Counter(dict(zip(present.tolist(), counts[present].tolist(), strict=True)))


def suspicions(dataset: SegmentationDataset, values: Counter[int]) -> list[str]:
    """What the values of all annotation files together give away, with the evidence and the cure.

    Args:
        dataset: a split.
        values: pixels by value, over all its annotation files.
    """
    if not values:
        return []
    if isinstance(dataset, CityscapesDataset):
        return _train_ids(values) or _label_ids(values)
    if isinstance(dataset, ADE20KDataset):
        return shifted_by_one(values, {VOID_VALUE, *dataset.info.category_ids}, DOWNLOAD)
    info, void = read_classes(_classes_file(dataset.files(0)[-1]))
    return shifted_by_one(values, {*info.category_ids, *void}, "correct the maps, or the ids in classes.yaml")


def _classes_file(label: Path) -> Path:
    return next(file for folder in label.parents if (file := folder / "classes.yaml").is_file())


def _train_ids(values: Counter[int]) -> list[str]:
    """Train ids 0..18 with 255 for void, where `instanceIds` maps are expected."""
    if max(values.keys() - {255}, default=0) > 18 or (255 not in values and len(values) < _MANY_TRAIN_IDS):
        return []
    return [
        f"the annotation maps seem to hold train ids instead of instanceIds (suspicion: {_shares(values, [255])}"
        "no other value is above 18, where single things have ids from 24000 on): give the "
        "*_gtFine_instanceIds.png of gtFine_trainvaltest.zip"
    ]


def _label_ids(values: Counter[int]) -> list[str]:
    """Label ids, which do not tell single things apart: every thing would be a crowd."""
    things = [value for value in values if 24 <= value <= 33]
    if not things or max(values) >= 1000:
        return []
    return [
        f"the annotation maps seem to hold labelIds instead of instanceIds (suspicion: {_shares(values, things)}"
        "but no thing is numbered, by values from 24000 on): all things would count as crowds and not be learnt; "
        "give the *_gtFine_instanceIds.png of gtFine_trainvaltest.zip"
    ]


def shifted_by_one(values: Counter[int], defined: Collection[int], cure: str) -> list[str]:
    """Class values that were moved up or down by one before.

    Moving down turns 0 into 255 in a byte and leaves the highest value unused; moving up does the reverse.

    Args:
        values: pixels by value, over a whole split.
        defined: all values that the format defines, void included.
        cure: ends the message.
    """
    lowest, highest = min(defined), max(set(defined) - {255})
    if 255 in values and 255 not in defined and highest not in values:
        evidence = f"{_shares(values, [255])}which the format does not define, and {highest} never occurs"
        return [f"the label maps seem shifted down by one (suspicion: {evidence}): {cure}"]
    if highest + 1 in values and highest + 1 not in defined and lowest not in values:
        evidence = f"{_shares(values, [highest + 1])}which the format does not define, and {lowest} never occurs"
        return [f"the label maps seem shifted up by one (suspicion: {evidence}): {cure}"]
    return []


def _shares(values: Counter[int], chosen: Collection[int]) -> str:
    """'255 covers 12.3 % of all pixels, ' for the chosen values that occur."""
    present = [value for value in sorted(chosen) if values[value]]
    if not present:
        return ""
    share = sum(values[value] for value in present) / values.total()
    names = ", ".join(map(str, present[:5])) + (", ..." if len(present) > 5 else "")
    return f"{names} cover{'s' if len(present) == 1 else ''} {share:.1%} of all pixels, "
