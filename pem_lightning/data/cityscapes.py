"""Cityscapes: its classes, and its two official archives read as they unzip, with no preparation step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    find_files,
    make_sample,
    pair_files,
    read_pair,
    read_rgb,
)
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Sample, Segment, UserError

# In the order of the official train ids; names, colours and ids as in cityscapesScripts' labels.py.
CITYSCAPES = DatasetInfo(
    "cityscapes",
    (
        ClassInfo("road", (128, 64, 128), False, 7),
        ClassInfo("sidewalk", (244, 35, 232), False, 8),
        ClassInfo("building", (70, 70, 70), False, 11),
        ClassInfo("wall", (102, 102, 156), False, 12),
        ClassInfo("fence", (190, 153, 153), False, 13),
        ClassInfo("pole", (153, 153, 153), False, 17),
        ClassInfo("traffic light", (250, 170, 30), False, 19),
        ClassInfo("traffic sign", (220, 220, 0), False, 20),
        ClassInfo("vegetation", (107, 142, 35), False, 21),
        ClassInfo("terrain", (152, 251, 152), False, 22),
        ClassInfo("sky", (70, 130, 180), False, 23),
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("rider", (255, 0, 0), True, 25),
        ClassInfo("car", (0, 0, 142), True, 26),
        ClassInfo("truck", (0, 0, 70), True, 27),
        ClassInfo("bus", (0, 60, 100), True, 28),
        ClassInfo("train", (0, 80, 100), True, 31),
        ClassInfo("motorcycle", (0, 0, 230), True, 32),
        ClassInfo("bicycle", (119, 11, 32), True, 33),
    ),
)

_CLASS_OF_LABEL = {label: index for index, label in enumerate(CITYSCAPES.category_ids)}
_NUM_LABELS = 34
_FIRST_COUNTED_LABEL = 24
"""From person on, single things are numbered, also those that are not evaluated (caravan, trailer)."""
_IMAGE_SUFFIX = "_leftImg8bit.png"
_ANNOTATIONS = {"train": "gtFine", "val": "gtFine", "train_extra": "gtCoarse", "test": None}
_HINT = (
    "log in at cityscapes-dataset.com, download leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip "
    "(for train_extra: leftImg8bit_trainextra.zip and gtCoarse.zip) and unzip them into dataset.root "
    "(or take dataset=synthetic to start now)"
)


class CityscapesDataset(SegmentationDataset):
    """One or several splits of the folder with `leftImg8bit` and `gtFine`, in the order of the images' names.

    `train_extra` is annotated coarsely (`gtCoarse`); `test` has images only, all void.

    Raises:
        UserError: a split is unknown, a folder missing or empty, or an image or an annotation lacks its counterpart.
    """

    prediction_suffix = _IMAGE_SUFFIX.removesuffix(".png")

    def __init__(
        self,
        root: str | Path,
        split: str | Sequence[str],
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        files: dict[str, tuple[Path, ...]] = {}
        problems: list[str] = []
        for one in [split] if isinstance(split, str) else split:
            if one not in _ANNOTATIONS:
                raise UserError(f"Cityscapes has no split {one!r}: choose from {', '.join(_ANNOTATIONS)}")
            images = find_files(Path(root) / "leftImg8bit" / one, _IMAGE_SUFFIX, _HINT, "*/")
            if kind := _ANNOTATIONS[one]:
                maps = find_files(Path(root) / kind / one, f"_{kind}_instanceIds.png", _HINT, "*/")
                pairs, missing = pair_files(images, maps, _HINT)
                files |= pairs
                problems += missing
            else:
                files |= {name: (path,) for name, path in images.items()}
        super().__init__(CITYSCAPES, dict(sorted(files.items())), problems, transform=transform, on_error=on_error)

    def read(self, index: int) -> Sample:
        """A segment's id is its value in the file."""
        files = self.files(index)
        if len(files) == 1:
            image = read_rgb(files[0], _HINT)
            return make_sample(image, np.full(image.shape[:2], VOID_ID, np.int32), (), self.names[index])
        image, values = read_pair(files, _HINT)
        try:
            panoptic, segments = panoptic_from_instance_ids(values)
        except ValueError as error:
            raise UserError(f"{files[1]} {error}: {_HINT}") from error
        return make_sample(image, panoptic, segments, self.names[index])


def panoptic_from_instance_ids(
    values: UInt[np.ndarray, "height width"],
) -> tuple[Int32[np.ndarray, "height width"], tuple[Segment, ...]]:
    """Read an official `instanceIds` map, by the rules of cityscapesScripts' createPanopticImgs.py.

    A value is a label id, or for single things a label id times 1000 plus a number. A thing without a number is a
    crowd; labels that are not evaluated become void. Segments come by rising id, which is the value in the file.

    Raises:
        ValueError: a value is none that Cityscapes defines.
    """
    present = np.flatnonzero(np.bincount(values.ravel()))  # four times as fast as np.unique
    is_numbered = (present >= 1000 * _FIRST_COUNTED_LABEL) & (present < 1000 * _NUM_LABELS)
    if unknown := present[~is_numbered & (present >= _NUM_LABELS)].tolist():
        raise ValueError(f"has ids that Cityscapes does not define ({', '.join(map(str, unknown[:5]))})")
    segments = []
    for value in present.tolist():
        numbered = value >= 1000
        class_id = _CLASS_OF_LABEL.get(value // 1000 if numbered else value)
        if class_id is not None:
            is_thing = CITYSCAPES.classes[class_id].is_thing
            segments.append(Segment(value, class_id, is_thing, is_crowd=is_thing and not numbered))
    table = np.full(int(present[-1]) + 1, VOID_ID, np.int32)
    ids = [segment.id for segment in segments]
    table[ids] = ids
    return table[values], tuple(segments)


class CityscapesDataModule(SegmentationDataModule):
    """Cityscapes; `train_splits` are what is trained on: "train", "train_extra" (the coarse set) or both."""

    info = CITYSCAPES

    def __init__(self, *arguments: Any, train_splits: Sequence[str] = ("train",), **loading: Any) -> None:
        super().__init__(*arguments, **loading)
        self.train_splits = tuple(train_splits)

    def make_dataset(self, split: str, transform: SampleTransform | None) -> CityscapesDataset:
        """One split."""
        splits = self.train_splits if split == "train" else split
        return CityscapesDataset(self.root, splits, transform, self.on_error)
