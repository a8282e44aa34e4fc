"""What every data set has in common: its items, how their files are read, and what a broken file does."""

from __future__ import annotations

import colorsys
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from rich.progress import track
from torch.utils.data import Dataset

from pem_lightning.files import is_system_file
from pem_lightning.images import exif_orientation as exif_orientation  # every data set needs these
from pem_lightning.images import read_map as read_map
from pem_lightning.images import read_pair as read_pair
from pem_lightning.images import read_rgb as read_rgb
from pem_lightning.processes import WorkerLoader
from pem_lightning.types import IGNORE_INDEX, ClassInfo, DatasetInfo, Sample, Segment, UserError

log = logging.getLogger(__name__)

SampleTransform = Callable[[Sample], Sample]
OnError = Literal["stop", "skip", "collect"]


class SegmentationDataset(Dataset[Sample], ABC):
    """One split of a data set. A subclass finds its files without opening them, and implements `read`.

    Attributes:
        common_files: files that describe several items, such as one JSON for all.
        image_ids: official ids of the images by name, where they are not the names.
        prediction_suffix: what a benchmark server wants prediction files to end in, before ".png".

    Args:
        files: the files of each item by its name: the image first, then its annotation.
        problems: what the subclass found wrong, one message each.
        on_error: for `problems` and unreadable files: "stop" raises the first, "skip" logs them and takes the next
            item instead, "collect" keeps `problems` and raises on reading.

    Raises:
        UserError: there are problems and `on_error` is "stop".
    """

    common_files: tuple[Path, ...] = ()
    prediction_suffix = ""

    def __init__(
        self,
        info: DatasetInfo,
        files: Mapping[str, tuple[Path, ...]],
        problems: Sequence[str] = (),
        *,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        if on_error not in get_args(OnError):
            raise UserError(f"dataset.on_error={on_error}: choose {' or '.join(get_args(OnError))}")
        problems = [" ".join(problem.splitlines()) for problem in problems]  # names of files may have several lines
        if problems and on_error == "stop":
            raise UserError(first_problem(problems))
        if on_error == "skip":
            for problem in problems:
                log.warning("left out: %s", problem)
        self.info = info
        self.names = list(files)
        self._files = list(files.values())
        self.image_ids: Mapping[str, Any] = {}
        self.problems = problems
        self.transform = transform
        self.on_error = on_error

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Decode one item; raises `UserError` that names a file which cannot be read or does not fit the others."""

    def remarks(self, index: int) -> list[str]:
        """What is unusual about an item, but may be meant; `check_data` counts the images that have each."""
        return []

    def files(self, index: int) -> tuple[Path, ...]:
        """The files of one item: its image, then its annotation if there is one."""
        return self._files[index]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        """Read and transform one item; raises `UserError` if it, or with `on_error="skip"` any item, cannot be read."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        for shift in range(len(self)):
            try:
                sample = self.read((index + shift) % len(self))
            except UserError as error:
                if self.on_error != "skip":
                    raise
                log.warning("skipped: %s", error)
            else:
                return self.transform(sample) if self.transform else sample
        raise UserError(f"none of the {len(self)} items can be read: look at the warnings above")


def make_sample(
    image: UInt8[np.ndarray, "height width 3"],
    panoptic: Int32[np.ndarray, "height width"],
    segments: Sequence[Segment],
    name: str,
) -> Sample:
    """A sample from decoded arrays. Its image is a view with the file's pixel order, which spares a copy."""
    return Sample(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(panoptic), tuple(segments), name)


def first_problem(problems: Sequence[str]) -> str:
    """The first of some problems, and how many more there are."""
    return problems[0] + (f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else "")


def find_files(folder: Path, suffix: str, hint: str, subfolders: str = "") -> dict[str, Path]:
    """All files of a kind by name without the suffix, or `UserError`; `subfolders` is a pattern such as "*/"."""
    found = (path for path in folder.glob(f"{subfolders}*{suffix}") if not is_system_file(path))
    files = {path.name.removesuffix(suffix): path for path in found}
    if not files:
        problem = "has no files" if folder.is_dir() else "does not exist; expected are files"
        raise UserError(f"{folder} {problem} {subfolders}*{suffix}: {hint}")
    return files


def pair_files(
    images: Mapping[str, Path], annotations: Mapping[str, Path], hint: str
) -> tuple[dict[str, tuple[Path, ...]], list[str]]:
    """The pairs of the same name, sorted by it, and one problem for every file without counterpart."""
    problems = [f"{images[name]} has no annotation: {hint}" for name in sorted(images.keys() - annotations.keys())]
    problems += [f"{annotations[name]} has no image: {hint}" for name in sorted(annotations.keys() - images.keys())]
    return {name: (images[name], annotations[name]) for name in sorted(images.keys() & annotations.keys())}, problems


def map_parallel(function: Callable[[Any], Any], items: Sequence[Any], workers: int, title: str) -> Iterable[Any]:
    """The function's results in order, from several processes (0: from this one), with a progress bar."""
    dataset: Any = items  # a sequence is all that a loader needs
    generator = torch.Generator()  # of its own: a loader draws from it, and must not from the training's
    loader = WorkerLoader(
        dataset, batch_size=None, num_workers=min(workers, len(items)), collate_fn=function, generator=generator
    )
    return track(loader, title, total=len(items), transient=True)


# Classes as the user's files describe them.

_GOLDEN_RATIO = 0.618033988749895


def distinct_color(index: int) -> tuple[int, int, int]:
    """A colour for a class without one: hues by the golden ratio, so that any number of them are far apart."""
    red, green, blue = colorsys.hsv_to_rgb(
        index * _GOLDEN_RATIO % 1, (0.9, 0.6)[index % 2], (0.95, 0.75)[index // 2 % 2]
    )
    return round(red * 255), round(green * 255), round(blue * 255)


def describe_classes(name: str, entries: Sequence[tuple[Any, Any, bool, Any]], source: Path) -> DatasetInfo:
    """Check the classes that a file lists: their name, colour (None for `distinct_color`), thing or not, and id.

    Raises:
        UserError: an entry is not valid, there are none or too many, or two share an id or a name.
    """
    classes = []
    for index, (label, color, is_thing, number) in enumerate(entries):
        if isinstance(label, bool):
            raise UserError(
                f"{source}: class {index} has no name: YAML reads no, off, yes and on as {str(label).lower()} or "
                f"{str(not label).lower()}, so put the name in quotes"
            )
        if not isinstance(label, str) or not label.strip():
            raise UserError(
                f"{source}: class {index} has no name: give every class a name, in quotes if it is a number"
            )
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise UserError(f"{source}: class {label!r} has the id {number!r}: give a whole number from 0 on")
        color = distinct_color(index) if color is None else color
        is_list = isinstance(color, Sequence) and len(color) == 3
        if not is_list or not all(isinstance(v, int) and 0 <= v <= 255 for v in color):
            raise UserError(
                f"{source}: class {label!r} has the color {color!r}: give [red, green, blue], 0 to 255 each"
            )
        classes.append(ClassInfo(label.strip(), tuple(color), is_thing, number))
    if not 1 <= len(classes) <= IGNORE_INDEX:
        raise UserError(f"{source} has {len(classes)} classes: there must be 1 to {IGNORE_INDEX}")
    for what, values in (("id", [str(c.category_id) for c in classes]), ("name", [c.name for c in classes])):
        repeated, times = Counter(values).most_common(1)[0]
        if times > 1:
            raise UserError(f"{source} has the class {what} {repeated} twice: give every class its own {what}")
    return DatasetInfo(name, tuple(classes))
