"""ADE20K (SceneParse150): its 150 classes, and its official archive read as it unzips.

Panoptic annotation is made from it once by `scripts/prepare_ade20k.py`.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    find_files,
    make_sample,
    pair_files,
    read_pair,
)
from pem_lightning.data.transforms import square_transforms
from pem_lightning.installation import tool_command
from pem_lightning.types import VOID_ID, ClassInfo, DatasetInfo, Sample, Segment, UserError

FOLDERS = {"train": "training", "val": "validation"}
PANOPTIC = {"train": "ade20k_panoptic_train", "val": "ade20k_panoptic_val"}
"""Names of the folders and, with .json, of the files that `scripts/prepare_ade20k.py` writes."""

DOWNLOAD = (
    "download data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and give the folder "
    "ADEChallengeData2016 that it unzips to as dataset.root"
)


_ROWS = csv.DictReader(Path(__file__).with_name("ade20k_classes.csv").read_text(encoding="utf-8").splitlines())
ADE20K = DatasetInfo(
    "ade20k",
    tuple(
        ClassInfo(r["name"], (int(r["red"]), int(r["green"]), int(r["blue"])), r["is_thing"] == "1", int(r["id"]) + 1)
        for r in _ROWS
    ),
)
"""Category ids are the values of the semantic maps, 1 to 150; 0 is void."""

ADE20K_PANOPTIC = DatasetInfo("ade20k", tuple(replace(c, category_id=c.category_id - 1) for c in ADE20K.classes))
"""The same classes; category ids are those of the panoptic JSON, 0 to 149."""


class ADE20KDataset(SegmentationDataset):
    """One split of the folder `ADEChallengeData2016`. Things are not told apart: each thing class makes one crowd.

    Raises:
        UserError: a folder is missing or empty, or an image and an annotation lack their counterpart.
    """

    def __init__(
        self, root: str | Path, split: str, transform: SampleTransform | None = None, on_error: OnError = "stop"
    ) -> None:
        images = find_files(Path(root) / "images" / FOLDERS[split], ".jpg", DOWNLOAD)
        maps = find_files(Path(root) / "annotations" / FOLDERS[split], ".png", DOWNLOAD)
        super().__init__(ADE20K, *pair_files(images, maps, DOWNLOAD), transform=transform, on_error=on_error)

    def read(self, index: int) -> Sample:
        """A segment's id is its value in the file."""
        image, values = read_pair(self.files(index), DOWNLOAD)
        present, things = np.unique(values).tolist(), ADE20K.thing_classes
        if (largest := present[-1]) > ADE20K.num_classes:
            known = f"ADE20K's are 0 (void) to {ADE20K.num_classes}"
            raise UserError(f"{self.files(index)[1]} has the value {largest}, but {known}: {DOWNLOAD}")
        segments = [Segment(v, v - 1, v - 1 in things, is_crowd=v - 1 in things) for v in present if v != VOID_ID]
        return make_sample(image, values.astype(np.int32), segments, self.names[index])


class ADE20KDataModule(SegmentationDataModule):
    """ADE20K from the folder `ADEChallengeData2016`; tasks but "semantic" need `scripts/prepare_ade20k.py` once."""

    def __init__(self, *arguments: Any, **loading: Any) -> None:
        super().__init__(*arguments, **loading)
        self.info = ADE20K if self.task == "semantic" else ADE20K_PANOPTIC

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """The paper's for ADE20K."""
        return square_transforms(512 if self.task == "semantic" else 640)

    def make_dataset(self, split: str, transform: SampleTransform | None) -> SegmentationDataset:
        """One split."""
        if self.task == "semantic":
            return ADE20KDataset(self.root, split, transform, self.on_error)
        annotation = self.root / f"{PANOPTIC[split]}.json"
        command = f"run `{tool_command('prepare_ade20k')} {self.root}`"
        if not self.root.is_dir():
            raise UserError(f"{self.root} does not exist: {DOWNLOAD}, then {command}")
        if not annotation.is_file():
            raise UserError(f"ADE20K has no panoptic annotation yet, {annotation} does not exist: {command}")
        return CocoPanopticDataset(
            annotation,
            self.root / "images" / FOLDERS[split],
            info=self.info,
            hint=f"unzip the archive again if it is an image, else remove the broken file and {command}",
            transform=transform,
            on_error=self.on_error,
        )
