"""The user's own semantic data set: images, maps whose values are class ids, and a `classes.yaml`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    checked_info,
    class_info,
    make_sample,
    pair_files,
    read_pair,
)
from pem_lightning.data.targets import IGNORE_INDEX, Task
from pem_lightning.data.transforms import resized_to_crops, square_crops
from pem_lightning.types import VOID_ID, DatasetInfo, Sample, Segment, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MAX_VALUE = 2**16 - 1
_ENTRY_KEYS = frozenset({"name", "color", "id"})
_CURE = "expected are root/classes.yaml and root/{images,labels}/{train,val}/, see docs/data.md"


class ClassList(NamedTuple):
    """What `classes.yaml` says.

    Attributes:
        info: the classes; official ids are the values in the maps.
        void: values of unlabelled pixels.
    """

    info: DatasetInfo
    void: frozenset[int]


def read_classes(path: Path) -> ClassList:
    """Read `classes.yaml`: a list of classes, or that list as `classes` beside a list `void` of values.

    A class is a name, or a mapping with `name` and optionally `color` ([red, green, blue]) and `id` (its value in the
    maps, by default its position). `void` is [255] unless the file says otherwise or a class has that value.

    Raises:
        UserError: the file is missing or says anything else.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {_CURE}") from error
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read {path} ({' '.join(str(error).split())}): write it as docs/data.md shows"
        ) from error
    if isinstance(content, list):
        content = {"classes": content}
    if (
        not isinstance(content, Mapping)
        or set(content) - {"classes", "void"}
        or not isinstance(content.get("classes"), list)
    ):
        raise UserError(f"{path} is no list of classes: write it as docs/data.md shows")
    info = _classes(content["classes"], path)
    void = content.get("void", [IGNORE_INDEX] if IGNORE_INDEX not in info.category_ids else [])
    if not isinstance(void, list) or not all(isinstance(value, int) and 0 <= value <= _MAX_VALUE for value in void):
        raise UserError(f"{path}: void must be a list of numbers from 0 to {_MAX_VALUE} such as [255]")
    if max(info.category_ids) > _MAX_VALUE:
        raise UserError(f"{path} has the id {max(info.category_ids)}: values of a map are at most {_MAX_VALUE}")
    if both := sorted(set(void) & set(info.category_ids)):
        raise UserError(f"{path}: the value {both[0]} is both void and a class: remove it from one of the two")
    return ClassList(info, frozenset(void))


def _classes(entries: Iterable[Any], path: Path) -> DatasetInfo:
    classes = []
    for index, entry in enumerate(entries):
        given = entry if isinstance(entry, Mapping) else {"name": entry}
        if unknown := sorted(set(map(str, given)) - _ENTRY_KEYS):
            raise UserError(
                f"{path}: class {index} has the key {unknown[0]!r}: known are {', '.join(sorted(_ENTRY_KEYS))}"
            )
        classes.append(class_info(index, given.get("name"), given.get("color"), False, given.get("id", index), path))
    return checked_info("semantic_folder", classes, path)


class SemanticFolderDataset(SegmentationDataset):
    """The images of one split with their class maps, in the order of their names.

    Each class makes one segment, whose id is the class index plus one.

    Args:
        root: the folder that holds `classes.yaml`, `images` and `labels`.
        split: "train", "val", or whatever else the two are divided into.
        transform: applied to every sample.
        on_error: what an unreadable file does, see `SegmentationDataset`.

    Raises:
        UserError: `classes.yaml` or a folder is missing or wrong, or an image and a map lack their counterpart.
    """

    def __init__(
        self, root: str | Path, split: str, transform: SampleTransform | None = None, on_error: OnError = "stop"
    ) -> None:
        self._classes_file = Path(root) / "classes.yaml"
        info, void = read_classes(self._classes_file)
        folders = [Path(root) / kind / split for kind in ("images", "labels")]
        images, same = _find(folders[0], IMAGE_SUFFIXES)
        labels, _ = _find(folders[1], frozenset({".png"}))
        cure = f"files below {folders[0]} and {folders[1]} need the same names but for the suffix"
        pairs, problems = pair_files(images, labels, cure)
        super().__init__(info, list(pairs), [*same, *problems], transform=transform, on_error=on_error)
        self._files = list(pairs.values())
        size = 1 + max((*info.category_ids, *void))
        # From a value in the file to a segment's id; -1 where there is none.
        self._table = np.full(size, -1, np.int32)
        self._table[list(void)] = VOID_ID
        self._table[list(info.category_ids)] = np.arange(1, info.num_classes + 1)

    def files(self, index: int) -> tuple[Path, ...]:
        """Image and map."""
        return self._files[index]

    def read(self, index: int) -> Sample:
        """Decode one item."""
        image_path, map_path = self._files[index]
        cure = f"correct the file or {self._classes_file}"
        image, values = read_pair(image_path, map_path, cure)
        present = np.flatnonzero(np.bincount(values.ravel()))
        inside = present[present < len(self._table)]
        if len(inside) < len(present) or (self._table[inside] < 0).any():
            unknown = [v for v in present.tolist() if v >= len(self._table) or self._table[v] < 0]
            raise UserError(f"{map_path} has the value {unknown[0]}, which is neither a class nor void: {cure}")
        ids = sorted(set(self._table[present].tolist()) - {VOID_ID})
        return make_sample(image, self._table[values], [Segment(i, i - 1, False) for i in ids], self.names[index])


def _find(folder: Path, suffixes: frozenset[str]) -> tuple[dict[str, Path], list[str]]:
    """Files below a folder by name (folders joined by underscores), and a problem for every name that occurs twice."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: {_CURE}")
    files: dict[str, Path] = {}
    problems = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file()):
        name = "_".join(path.relative_to(folder).with_suffix("").parts)
        if name in files:
            problems.append(f"{path} has the same name as {files[name]}: rename one of them")
        files.setdefault(name, path)
    if not files:
        raise UserError(f"{folder} has no files that end in {', '.join(sorted(suffixes))}: {_CURE}")
    return files, problems


class SemanticFolderDataModule(SegmentationDataModule):
    """The user's own semantic data set; the classes are those of its `classes.yaml`.

    Args:
        root: the folder that holds `classes.yaml`, `images` and `labels`.
        task: "semantic"; things are not known, so that no other task makes sense.
        batch_size: training images per device.
        train_transform: by default crops of 640x640, see `square_crops`.
        eval_transform: by default the shortest edge becomes 640.
        loading: how; see `SegmentationDataModule`.

    Raises:
        UserError: the task is another, or `classes.yaml` is missing or wrong.
    """

    def __init__(
        self,
        root: str | Path = "data/semantic_folder",
        task: Task = "semantic",
        batch_size: int = 16,
        train_transform: SampleTransform | None = None,
        eval_transform: SampleTransform | None = None,
        **loading: Any,
    ) -> None:
        if task != "semantic":
            raise UserError(f"dataset=semantic_folder has no task={task}: choose task=semantic")
        super().__init__(
            task=task,
            batch_size=batch_size,
            train_transform=train_transform or square_crops(640),
            eval_transform=eval_transform or resized_to_crops(640),
            **loading,
        )
        self.root = Path(root)
        self.info = read_classes(self.root / "classes.yaml").info

    def make_dataset(self, split: str, transform: SampleTransform | None) -> SemanticFolderDataset:
        """One split as a dataset."""
        return SemanticFolderDataset(self.root, split, transform, self.on_error)
