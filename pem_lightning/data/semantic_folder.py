"""The user's own semantic data set: images, maps whose values are class ids, and a `classes.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    describe_classes,
    make_sample,
    pair_files,
    read_pair,
)
from pem_lightning.data.transforms import square_transforms
from pem_lightning.files import is_system_file
from pem_lightning.types import IGNORE_INDEX, VOID_ID, DatasetInfo, Sample, Segment, Task, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MAX_VALUE = 2**16 - 1
_ENTRY_KEYS = frozenset({"name", "color", "id"})
_HINT = "expected are root/classes.yaml and root/{images,labels}/{train,val}/, see docs/data.md"


def read_classes(path: Path) -> tuple[DatasetInfo, frozenset[int]]:
    """Read `classes.yaml`: a list of classes, or that list as `classes` beside a list `void` of values.

    A class is a name, or a mapping with `name` and optionally `color` ([red, green, blue]) and `id` (its value in the
    maps, by default its position). `void` is [255] unless the file says otherwise or a class has that value.

    Returns:
        The classes, whose category ids are the values in the maps, and the values of unlabelled pixels.

    Raises:
        UserError: the file is missing or says anything else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {_HINT}") from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read {path} ({' '.join(str(error).split())}): write it as docs/data.md shows"
        ) from error
    if isinstance(content, list):
        content = {"classes": content}
    is_known = isinstance(content, Mapping) and not set(content) - {"classes", "void"}
    if not is_known or not isinstance(content.get("classes"), list):
        raise UserError(f"{path} is no list of classes: write it as docs/data.md shows")
    entries = []
    for index, entry in enumerate(content["classes"]):
        given = entry if isinstance(entry, Mapping) else {"name": entry}
        if unknown := sorted(set(map(str, given)) - _ENTRY_KEYS):
            raise UserError(
                f"{path}: class {index} has the key {unknown[0]!r}: known are {', '.join(sorted(_ENTRY_KEYS))}"
            )
        entries.append((given.get("name"), given.get("color"), False, given.get("id", index)))
    info = describe_classes("semantic_folder", entries, path)
    void = content.get("void", [IGNORE_INDEX] if IGNORE_INDEX not in info.category_ids else [])
    if not isinstance(void, list) or not all(isinstance(value, int) and 0 <= value <= _MAX_VALUE for value in void):
        raise UserError(f"{path}: void must be a list of numbers from 0 to {_MAX_VALUE} such as [255]")
    if max(info.category_ids) > _MAX_VALUE:
        raise UserError(f"{path} has the id {max(info.category_ids)}: values of a map are at most {_MAX_VALUE}")
    if both := sorted(set(void) & set(info.category_ids)):
        raise UserError(f"{path}: the value {both[0]} is both void and a class: remove it from one of the two")
    return info, frozenset(void)


class SemanticFolderDataset(SegmentationDataset):
    """`root` holds `classes.yaml`, images below `images/<split>`, and PNGs of the same names below `labels/<split>`.

    A subclass may know another layout.

    Raises:
        UserError: `classes.yaml` is missing or wrong, or files are missing or ambiguous.
    """

    hint = _HINT

    def __init__(
        self, root: str | Path, split: str, transform: SampleTransform | None = None, on_error: OnError = "stop"
    ) -> None:
        self.root = Path(root)
        info, self.void = self.read_classes()
        image_folder, label_folder = self.folders(split)
        images, same = _find(image_folder, IMAGE_SUFFIXES, self.hint)
        labels, _ = _find(label_folder, frozenset({".png"}), self.hint)
        if (listed := self.listed(split)) is not None:
            missing = sorted(listed - images.keys())
            same += [f"{image_folder} lacks {name}, which the list of {split} has: {self.hint}" for name in missing]
            images, labels = ({name: files[name] for name in files.keys() & listed} for files in (images, labels))
        hint = f"files below {image_folder} and {label_folder} need the same names but for the suffix"
        pairs, problems = pair_files(images, labels, hint)
        super().__init__(info, pairs, [*same, *problems], transform=transform, on_error=on_error)
        # From a value in the file to a segment's id; -1 where there is none.
        self._table = np.full(1 + max((*info.category_ids, *self.void)), -1, np.int32)
        self._table[list(self.void)] = VOID_ID
        self._table[list(info.category_ids)] = np.arange(1, info.num_classes + 1)

    def read_classes(self) -> tuple[DatasetInfo, frozenset[int]]:
        """The classes, and the values of void."""
        return read_classes(self.root / "classes.yaml")

    def folders(self, split: str) -> tuple[Path, Path]:
        """Of images and maps."""
        return self.root / "images" / split, self.root / "labels" / split

    def listed(self, split: str) -> frozenset[str] | None:
        """Names of the images of a split; None for all in its folder."""
        return None

    def values_hint(self) -> str:
        """What to do about an annotation that does not fit."""
        return f"correct the file or {self.root / 'classes.yaml'}"

    def read(self, index: int) -> Sample:
        """Decode one item."""
        hint = self.values_hint()
        image, values = read_pair(self.files(index), hint)
        present = np.flatnonzero(np.bincount(values.ravel())).tolist()
        if unknown := [value for value in present if value >= len(self._table) or self._table[value] < 0]:
            path = self.files(index)[1]
            raise UserError(f"{path} has the value {unknown[0]}, which is neither a class nor void: {hint}")
        ids = sorted(set(self._table[present].tolist()) - {VOID_ID})
        return make_sample(image, self._table[values], [Segment(i, i - 1, False) for i in ids], self.names[index])


def _find(folder: Path, suffixes: frozenset[str], hint: str) -> tuple[dict[str, Path], list[str]]:
    """Files below a folder by name (folders joined by underscores), and a problem for every name that occurs twice."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: {hint}")
    files: dict[str, Path] = {}
    problems = []
    found = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file() and not is_system_file(p))
    for path in sorted(found):
        name = "_".join(path.relative_to(folder).with_suffix("").parts)
        if name in files:
            problems.append(f"{path} has the same name as {files[name]}: rename one of them")
        files.setdefault(name, path)
    if not files:
        raise UserError(f"{folder} has no files that end in {', '.join(sorted(suffixes))}: {hint}")
    return files, problems


class SemanticFolderDataModule(SegmentationDataModule):
    """The user's own semantic data set; the classes are those of its `classes.yaml`. It has no things.

    Args:
        eval_split: what is evaluated instead of "val", such as "test". Trainings are validated on "val" only.

    Raises:
        UserError: the task is not "semantic", or `classes.yaml` is missing or wrong.
    """

    choice = "semantic_folder"
    dataset: type[SemanticFolderDataset] = SemanticFolderDataset

    def __init__(
        self, root: str | Path, task: Task = "semantic", *arguments: Any, eval_split: str = "val", **loading: Any
    ) -> None:
        if task != "semantic":
            raise UserError(f"dataset={self.choice} has no task={task}: choose task=semantic")
        super().__init__(root, task, *arguments, **loading)
        self.eval_split = eval_split
        self.info = self.read_info()

    def read_info(self) -> DatasetInfo:
        """The classes."""
        return read_classes(self.root / "classes.yaml")[0]

    def setup(self, stage: str | None = None) -> None:
        """As for every data set; raises `UserError` if a training would choose its best weights by another split."""
        if stage == "fit" and self.eval_split != "val":
            raise UserError(f"dataset.eval_split={self.eval_split} is for evaluate.py: trainings are validated on val")
        super().setup(stage)

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """The paper's for ADE20K."""
        return square_transforms(640)

    def make_dataset(self, split: str, transform: SampleTransform | None) -> SemanticFolderDataset:
        """One split."""
        return self.dataset(self.root, self.eval_split if split == "val" else split, transform, self.on_error)
