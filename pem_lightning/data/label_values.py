"""Label maps that are valid to the letter and wrong all the same, suspected by the values of a whole split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from pem_lightning.data.ade20k import DOWNLOAD, VOID_VALUE, ADE20KDataset
from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.data.reading import read_map
from pem_lightning.data.semantic_folder import SemanticFolderDataset, read_classes
from pem_lightning.errors import UserError

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
        return shifted_by_one(values, {VOID_VALUE, *dataset.info.official_ids}, DOWNLOAD)
    info, void = read_classes(_classes_file(dataset.files(0)[-1]))
    return shifted_by_one(values, {*info.official_ids, *void}, "correct the maps, or the ids in classes.yaml")


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
