"""The JSON of the COCO panoptic format: its categories as classes, its annotations in flat arrays."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8

from pem_lightning.data.classes import checked_info, class_info
from pem_lightning.errors import UserError
from pem_lightning.panoptic_png import MAX_ID
from pem_lightning.types import VOID_ID, DatasetInfo

_CURE = "give a COCO panoptic JSON, see cocodataset.org/#format-data"

Content = Mapping[str, Any]


def read_panoptic_json(
    path: Path, cure: str, lists: Sequence[str] = ("images", "annotations", "categories")
) -> Content:
    """Read a file and check that it has the format's lists.

    Args:
        path: of the JSON.
        cure: what the user can do if there is none.
        lists: those that it must have; a file of predictions often has no others than "annotations".

    Raises:
        UserError: it is missing, no JSON, or of another format.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: {cure}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path} ({str(error).splitlines()[0]}): {_CURE}") from error
    for key in lists:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path} has no list {key!r}: {_CURE}")
        if not all(isinstance(entry, dict) for entry in content[key]):
            raise UserError(f"{path} has entries in {key!r} that are no objects: {_CURE}")
    return content


def classes_of(content: Content, path: Path, name: str) -> DatasetInfo:
    """The classes, in the order of the file's categories.

    Raises:
        UserError: a category lacks its id, its name or `isthing`, or an id or a name occurs twice.
    """
    classes = []
    for index, category in enumerate(content["categories"]):
        if category.get("isthing") not in (0, 1):
            raise UserError(f"{path}: category {category.get('name')!r} does not say isthing 0 or 1: {_CURE}")
        is_thing = bool(category["isthing"])
        classes.append(
            class_info(index, category.get("name"), category.get("color"), is_thing, category.get("id"), path)
        )
    return checked_info(name, classes, path)


def check_same_classes(found: DatasetInfo, expected: DatasetInfo, path: Path) -> None:
    """Refuse a file whose categories are not those of the data set.

    Raises:
        UserError: they differ in order, ids, names or kinds.
    """
    ours = [(c.official_id, c.name, c.is_thing) for c in expected.classes]
    theirs = [(c.official_id, c.name, c.is_thing) for c in found.classes]
    if ours != theirs:
        index = next(
            (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
        )
        raise UserError(
            f"{path} has other categories than the rest of {expected.name}, from number {index} on: "
            "all files of a data set need the same, in the same order"
        )


class PanopticIndex:
    """Which files belong together and what their segments are.

    Millions of segments as Python objects would be copied into every loading process bit by bit, as soon as they are
    looked at; three flat arrays are shared.

    Attributes:
        names: unique, the images' file names without suffix, folders joined by an underscore.
        images: file names of the images.
        maps: file names of the PNGs.
        problems: entries that were left out, one message each.

    Args:
        content: of the JSON.
        path: named in problems.
        info: the classes.

    Raises:
        UserError: the format is violated where nothing can be left out.
    """

    def __init__(self, content: Content, path: Path, info: DatasetInfo) -> None:
        self.names: list[str] = []
        self.images: list[str] = []
        self.maps: list[str] = []
        self.problems: list[str] = []
        self._class_of = {official_id: index for index, official_id in enumerate(info.official_ids)}
        counts, rows = [0], []
        for image, annotation in self._pairs(content, path):
            segments: Any = annotation.get("segments_info")
            map_name = annotation.get("file_name") or str(PurePosixPath(image).with_suffix(".png"))
            fault = self._fault(segments) if is_file_name(map_name) else f"has the file_name {map_name!r}"
            if fault:
                self.problems.append(f"{path}: annotation of {image} {fault}: correct the JSON")
                continue
            self.names.append(_name_of(image))
            self.images.append(image)
            self.maps.append(map_name)
            rows += [(s["id"], self._class_of[s["category_id"]], bool(s.get("iscrowd"))) for s in segments]
            counts.append(len(segments))
        self._starts = np.cumsum(counts)
        columns = np.array(rows, np.int32).reshape(-1, 3)
        self._ids = np.ascontiguousarray(columns[:, 0])
        self._classes = columns[:, 1].astype(np.uint8)
        self._crowd = columns[:, 2].astype(bool)
        if len(set(self.names)) < len(self.names):
            repeated, _ = Counter(self.names).most_common(1)[0]
            raise UserError(f"{path} has several images named {repeated}: remove or rename all but one")

    def segments(
        self, index: int
    ) -> tuple[Int32[np.ndarray, " segments"], UInt8[np.ndarray, " segments"], Bool[np.ndarray, " segments"]]:
        """Ids, class indices and crowd flags of one image's segments, in the file's order."""
        part = slice(self._starts[index], self._starts[index + 1])
        return self._ids[part], self._classes[part], self._crowd[part]

    def _pairs(self, content: Content, path: Path) -> Iterator[tuple[str, Content]]:
        """Image file names with their annotations, in the order of the images."""
        annotations = {str(a.get("image_id")): a for a in content["annotations"]}
        if len(annotations) < len(content["annotations"]):
            raise UserError(f"{path} annotates an image twice: remove one of the annotations")
        for image in content["images"]:
            if not is_file_name(image.get("file_name")):
                raise UserError(f"{path} has an image without file_name, or with one that no file can have: {_CURE}")
            annotation = annotations.pop(str(image.get("id")), None)
            if annotation is None:
                self.problems.append(f"{path}: {image['file_name']} has no annotation: annotate it or remove the entry")
            else:
                yield image["file_name"], annotation
        for image_id in annotations:
            self.problems.append(f"{path}: the annotation of image_id {image_id} has no image: correct the JSON")

    def _fault(self, segments: Any) -> str | None:
        """What is wrong with the segments of one image."""
        if not isinstance(segments, list) or not all(isinstance(s, dict) for s in segments):
            return "has no list segments_info"
        seen = set()
        for segment in segments:
            number, category = segment.get("id"), segment.get("category_id")
            if not isinstance(number, int) or not VOID_ID < number <= MAX_ID:
                return f"has the segment id {number!r}, which is not from 1 to {MAX_ID}"
            if number in seen:
                return f"has the segment id {number} twice"
            if not isinstance(category, int) or category not in self._class_of:
                return f"has the category_id {category!r}, which no category has"
            if segment.get("iscrowd", 0) not in (0, 1):
                return f"has a segment with iscrowd {segment['iscrowd']!r}, which is neither 0 nor 1"
            seen.add(number)
        return None


def is_file_name(value: Any) -> bool:
    """Whether a file can have this name: an empty or endless one would be an error of the operating system."""
    if not isinstance(value, str) or "\0" in value or len(value) > 1024:
        return False
    parts = PurePosixPath(value).parts
    return PurePosixPath(value).name != "" and all(len(p.encode("utf-8", "surrogatepass")) < 256 for p in parts)


def _name_of(image: str) -> str:
    return "_".join(PurePosixPath(image).with_suffix("").parts)


def renumbered(
    ids: Int32[np.ndarray, "height width"], known: Int32[np.ndarray, " segments"]
) -> tuple[Int32[np.ndarray, "height width"], Int64[np.ndarray, " unknown"]]:
    """Replace ids of up to 24 bits by their position in a list plus one, so that tables over ids stay small.

    Args:
        ids: of every pixel; `VOID_ID` stays.
        known: the ids that may occur.

    Returns:
        The new map, and the ids that are not known, which are void in it.
    """
    flat = ids.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))  # of runs of one id: far fewer than pixels
    values = flat[starts]
    order = np.argsort(known)
    numbers = np.concatenate([order + 1, [VOID_ID]]).astype(np.int32)
    ranked = np.concatenate([known[order], [-1]])
    place = np.searchsorted(ranked[:-1], values)
    hit = ranked[place] == values
    unknown = np.unique(values[~hit & (values != VOID_ID)]).astype(np.int64)
    runs = np.where(hit, numbers[place], VOID_ID).astype(np.int32)
    return np.repeat(runs, np.diff(starts, append=flat.size)).reshape(ids.shape), unknown
