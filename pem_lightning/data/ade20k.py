"""ADE20K (SceneParse150): its 150 classes, and its official archive read just as it unzips.

Panoptic annotation is made from it once, see `ade20k_panoptic`.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import OnError, SampleTransform, SegmentationDataset, make_sample, pair_files, read_pair
from pem_lightning.data.targets import Task
from pem_lightning.data.transforms import resized_to_crops, square_crops
from pem_lightning.types import ClassInfo, DatasetInfo, Sample, Segment, UserError

VOID_VALUE = 0
"""Value of unlabelled pixels in the annotation; class k of ours is value k + 1."""

FOLDERS = {"train": "training", "val": "validation"}
PANOPTIC = {"train": "ade20k_panoptic_train", "val": "ade20k_panoptic_val"}
"""Names of the folders and, with .json, of the files that `scripts/prepare_ade20k.py` writes."""

DOWNLOAD = (
    "download data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and give the folder "
    "ADEChallengeData2016 that it unzips to as dataset.root"
)


def _read_classes() -> tuple[ClassInfo, ...]:
    with Path(__file__).with_name("ade20k_classes.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return tuple(
        ClassInfo(r["name"], (int(r["red"]), int(r["green"]), int(r["blue"])), r["is_thing"] == "1", int(r["id"]) + 1)
        for r in rows
    )


ADE20K = DatasetInfo("ade20k", _read_classes())
"""Official ids are the annotation's values, 1 to 150."""

ADE20K_PANOPTIC = DatasetInfo("ade20k", tuple(replace(c, category_id=c.category_id - 1) for c in ADE20K.classes))
"""The same classes; official ids are the categories of the panoptic JSON, 0 to 149."""


class ADE20KDataset(SegmentationDataset):
    """The images of one split with their class maps, in the order of their names.

    Things are not told apart here, so each thing class makes one crowd.

    Args:
        root: the folder `ADEChallengeData2016`.
        split: "train" or "val".
        transform: applied to every sample.
        on_error: what an unreadable file does, see `SegmentationDataset`.

    Raises:
        UserError: a folder is missing or empty, or an image and an annotation lack their counterpart.
    """

    def __init__(
        self, root: str | Path, split: str, transform: SampleTransform | None = None, on_error: OnError = "stop"
    ) -> None:
        images = find_files(Path(root) / "images" / FOLDERS[split], "jpg", DOWNLOAD)
        maps = find_files(Path(root) / "annotations" / FOLDERS[split], "png", DOWNLOAD)
        pairs, problems = pair_files(images, maps, DOWNLOAD)
        super().__init__(ADE20K, list(pairs), problems, transform=transform, on_error=on_error)
        self._files = list(pairs.values())

    def files(self, index: int) -> tuple[Path, ...]:
        """Photograph and class map."""
        return self._files[index]

    def read(self, index: int) -> Sample:
        """Decode one item; a segment's id is its value in the file."""
        image_path, map_path = self._files[index]
        image, values = read_pair(image_path, map_path, DOWNLOAD)
        present = np.unique(values).tolist()
        if present[-1] > ADE20K.num_classes:
            raise UserError(
                f"{map_path} has the value {present[-1]}, but ADE20K's are 0 (void) to {ADE20K.num_classes}: {DOWNLOAD}"
            )
        things = ADE20K.thing_classes
        segments = [
            Segment(value, value - 1, value - 1 in things, is_crowd=value - 1 in things)
            for value in present
            if value != VOID_VALUE
        ]
        return make_sample(image, values.astype(np.int32), segments, self.names[index])


def find_files(folder: Path, suffix: str, cure: str) -> dict[str, Path]:
    """All files of a kind in a folder, by name.

    Raises:
        UserError: there are none.
    """
    files = {path.stem: path for path in folder.glob(f"*.{suffix}")}
    if not files:
        problem = f"has no *.{suffix} files" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {problem}: {cure}")
    return files


class ADE20KDataModule(SegmentationDataModule):
    """ADE20K with the paper's augmentation; the defaults are the paper's numbers (batch size over all devices: 32).

    Args:
        root: the folder `ADEChallengeData2016`; other tasks than "semantic" need `scripts/prepare_ade20k.py` once.
        task: "panoptic", "semantic" or "instance".
        batch_size: training images per device.
        train_transform: by default the paper's augmentation, crops of 512x512 (semantic) or 640x640.
        eval_transform: by default the shortest edge becomes that of a crop.
        loading: how; see `SegmentationDataModule`.
    """

    def __init__(
        self,
        root: str | Path = "data/ADEChallengeData2016",
        task: Task = "panoptic",
        batch_size: int = 32,
        train_transform: SampleTransform | None = None,
        eval_transform: SampleTransform | None = None,
        **loading: Any,
    ) -> None:
        edge = 512 if task == "semantic" else 640
        super().__init__(
            task=task,
            batch_size=batch_size,
            train_transform=train_transform or square_crops(edge),
            eval_transform=eval_transform or resized_to_crops(edge),
            **loading,
        )
        self.root = Path(root)
        self.info = ADE20K if task == "semantic" else ADE20K_PANOPTIC

    def make_dataset(self, split: str, transform: SampleTransform | None) -> SegmentationDataset:
        """One split as a dataset.

        Raises:
            UserError: files are missing, or the panoptic annotation has not been made.
        """
        if self.task == "semantic":
            return ADE20KDataset(self.root, split, transform, self.on_error)
        annotation = self.root / f"{PANOPTIC[split]}.json"
        command = f"run `python scripts/prepare_ade20k.py {self.root}`"
        if not annotation.is_file():
            if not self.root.is_dir():
                raise UserError(f"{self.root} does not exist: {DOWNLOAD}, then {command}")
            raise UserError(f"ADE20K has no panoptic annotation yet, {annotation} does not exist: {command}")
        return CocoPanopticDataset(
            annotation,
            self.root / "images" / FOLDERS[split],
            info=self.info,
            cure=f"unzip the archive again if it is an image, else remove the broken file and {command}",
            transform=transform,
            on_error=self.on_error,
        )
