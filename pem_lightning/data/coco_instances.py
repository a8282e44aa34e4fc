"""Objects in the COCO instance format: one JSON with polygons or run lengths, and the images.

`Sample` gives every pixel to one segment. Where objects overlap, the smaller is on top; crowds lie below all objects.
Masks are drawn by pycocotools, so that they are those of COCO's evaluator: the polygons of one object are united (a
polygon inside another is no hole, only run lengths have holes), and what lies outside the image is cut off.

What the JSON says wrongly is an error, as in the other data sets. What leaves no doubt about the pixels is a remark:
overlaps, polygons beyond the border, and objects that have no pixel or none left, which nothing could be learnt from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from pycocotools import mask as coco_mask

from pem_lightning.data.coco import (
    FILES_HINT,
    Content,
    check_same_classes,
    class_indices,
    is_file_name,
    read_coco_json,
    whole_number,
)
from pem_lightning.data.datamodule import SegmentationDataModule
from pem_lightning.data.dataset import (
    OnError,
    SampleTransform,
    SegmentationDataset,
    describe_classes,
    make_sample,
    read_rgb,
)
from pem_lightning.data.transforms import square_transforms
from pem_lightning.types import VOID_ID, DatasetInfo, Sample, Segment, UserError

BACKGROUND = "background"
_FARTHEST = 100_000
"""Coordinates beyond are a mistake, and pycocotools would need much memory for them."""

OVERLAP = "overlapping objects: the smaller is on top, crowds are below"
NO_PIXELS = "objects without a pixel (polygons of fewer than 3 points, of no area, or outside): left out"
COVERED = "objects that smaller ones cover completely: left out"
CROWDS = "crowds (iscrowd 1), which are neither learnt nor counted; some tools write painted masks so"
BEYOND = "polygons or boxes beyond the image's border: cut off there"


class _Object(NamedTuple):
    """An annotated object: polygons [[x, y, ...], ...], or run lengths down the columns, first of what is outside."""

    class_id: int
    is_crowd: bool
    polygons: list[list[int | float]]
    run_lengths: list[int] | None
    is_beyond: bool


class CocoInstancesDataset(SegmentationDataset):
    """The images of one JSON with their objects, in the order of its list of images.

    Images without objects stay. An image with a wrong annotation is treated as an unreadable file. `area` is not used.

    Args:
        annotation: the JSON.
        images: the folder that its images' file names are relative to.
        background: add a class of stuff, the last one, for all pixels without object; without it they are void.
        info: the classes that the file must have; by default those it has, named after its file.
        hint: what the user can do about a file that is missing or broken.

    Raises:
        UserError: the JSON is missing or not in the format, or files or entries lack their counterpart.
    """

    def __init__(
        self,
        annotation: str | Path,
        images: str | Path,
        *,
        background: bool = False,
        info: DatasetInfo | None = None,
        hint: str = FILES_HINT,
        transform: SampleTransform | None = None,
        on_error: OnError = "stop",
    ) -> None:
        path, folder = Path(annotation), Path(images)
        content = read_instances_json(path, hint)
        found = instance_classes(content, path, path.stem, background)
        if info is not None:
            check_same_classes(found, info, path)
        if not folder.is_dir():
            raise UserError(f"{folder} does not exist: {hint}")
        problems: list[str] = []
        annotations = _by_image(content, path, problems)
        class_of = class_indices(found)
        files: dict[str, tuple[Path, ...]] = {}
        image_ids, sizes, texts = {}, [], []
        for image in content["images"]:
            file_name, name = _names(image, path)
            try:
                size = _size(image)
                objects = [_object(a, size, class_of) for a in annotations[str(image.get("id"))]]
            except ValueError as error:
                problems.append(f"{path}: {file_name} {error}: correct the JSON")
                continue
            if not (file := folder / file_name).is_file():
                problems.append(f"{file} does not exist: {hint}")
                continue
            if name in files:
                raise UserError(f"{path} has several images named {name}: remove or rename all but one")
            files[name] = (file,)
            image_ids[name] = image["id"]
            sizes.append(size)
            texts.append(json.dumps(objects).encode())
        super().__init__(info or found, files, problems, transform=transform, on_error=on_error)
        if not files:
            raise UserError(f"{path} annotates no image that is there: {hint}")
        self.common_files = (path,)
        self.image_ids = image_ids
        self.background = background
        self._hint = hint
        self._sizes = np.array(sizes, np.int32)
        # As one text, because every loading process would get its own copy of millions of Python objects.
        self._text = np.frombuffer(b"".join(texts), np.uint8)
        self._starts = np.cumsum([0, *map(len, texts)])

    def read(self, index: int) -> Sample:
        """Decode one item."""
        (file,) = self.files(index)
        image = read_rgb(file, self._hint)
        height, width = self._sizes[index].tolist()
        if image.shape[:2] != (height, width):
            turned = ", or turn it as its EXIF orientation says" if image.shape[:2] == (width, height) else ""
            raise UserError(
                f"{file} is {image.shape[1]}x{image.shape[0]}, but {self.common_files[0]} says {width}x{height}: "
                f"give the image that was annotated{turned}"
            )
        objects = self._objects(index)
        ids = _painted([_mask(o, height, width) for o in objects], objects, height, width)
        present = np.bincount(ids.ravel(), minlength=len(objects) + 1) > 0
        numbers = np.where(present, np.cumsum(present) - present[VOID_ID], VOID_ID).astype(np.int32)
        seen = [o for o, is_there in zip(objects, present[1:], strict=True) if is_there]
        segments = [Segment(n, o.class_id, True, o.is_crowd) for n, o in enumerate(seen, start=1)]
        if self.background and present[VOID_ID]:
            numbers[VOID_ID] = len(segments) + 1
            segments.append(Segment(len(segments) + 1, self.info.num_classes - 1, False))
        return make_sample(image, numbers[ids], segments, self.names[index])

    def remarks(self, index: int) -> list[str]:
        """What is unusual about the objects of one item; the pixels are compared as run lengths, which is fast."""
        objects, (height, width) = self._objects(index), self._sizes[index].tolist()
        masks = [_mask(o, height, width) for o in objects]
        areas = [int(coco_mask.area(m)) for m in masks]
        found = {BEYOND} if any(o.is_beyond for o in objects) else set()
        if any(o.is_crowd for o in objects):
            found.add(CROWDS)
        above = None
        for i in reversed(_order(objects, areas)):
            if not areas[i]:
                found.add(NO_PIXELS)
                continue
            shared = int(coco_mask.area(coco_mask.merge([above, masks[i]], intersect=True))) if above else 0
            if shared:
                found |= {OVERLAP, COVERED} if shared == areas[i] else {OVERLAP}
            above = coco_mask.merge([above, masks[i]]) if above else masks[i]
        return [remark for remark in (OVERLAP, COVERED, NO_PIXELS, BEYOND, CROWDS) if remark in found]

    def _objects(self, index: int) -> list[_Object]:
        return [_Object(*o) for o in json.loads(self._text[self._starts[index] : self._starts[index + 1]].tobytes())]


class CocoInstancesDataModule(SegmentationDataModule):
    """A data set in the COCO instance format; its things are the categories of the validation JSON.

    Tasks but "instance" have one class more, the background. Paths are relative to `root`.

    Raises:
        UserError: there is no validation JSON, or it is not in the format.
    """

    def __init__(
        self,
        *arguments: Any,
        train_json: str = "annotations/instances_train2017.json",
        train_images: str = "train2017",
        val_json: str = "annotations/instances_val2017.json",
        val_images: str = "val2017",
        **loading: Any,
    ) -> None:
        super().__init__(*arguments, **loading)
        self.places = {"train": (train_json, train_images), "val": (val_json, val_images)}
        path = self.root / val_json
        content = read_instances_json(path, FILES_HINT)
        self.info = instance_classes(content, path, "coco_instances", self.task != "instance")

    def default_transforms(self) -> tuple[SampleTransform, SampleTransform]:
        """The paper's for ADE20K."""
        return square_transforms(640)

    def make_dataset(self, split: str, transform: SampleTransform | None) -> CocoInstancesDataset:
        """One split."""
        annotation, images = self.places[split]
        return CocoInstancesDataset(
            self.root / annotation,
            self.root / images,
            background=self.task != "instance",
            info=self.info,
            transform=transform,
            on_error=self.on_error,
        )


def read_instances_json(path: Path, hint: str) -> Content:
    """Raises `UserError` if the file is missing, of another format, or without an object to learn."""
    content = read_coco_json(path, hint, kind="instance")
    annotations = content["annotations"]
    if any("segments_info" in a for a in annotations):
        raise UserError(f"{path} holds a panoptic annotation (segments_info): choose dataset=coco_panoptic")
    if not annotations:
        raise UserError(f"{path} annotates no object: give a JSON with at least one")
    if all(a.get("iscrowd") == 1 for a in annotations):
        raise UserError(
            f"{path}: all {len(annotations)} objects are crowds (iscrowd 1), which are neither learnt nor counted: "
            "set iscrowd to 0 (some tools write 1 for every painted mask)"
        )
    return content


def instance_classes(content: Content, path: Path, name: str, background: bool) -> DatasetInfo:
    """The things, in the order of the file's categories, then the background if asked for.

    Roboflow lists the whole project as one more category, the parent of all others; it is no class.
    """
    parents = {c.get("supercategory") for c in content["categories"][1:]}
    categories = [
        c
        for index, c in enumerate(content["categories"])
        if index or c.get("supercategory") != "none" or c.get("name") not in parents
    ]
    entries: list[tuple[Any, Any, bool, Any]] = []
    for category in categories:
        color, number = category.get("color"), category.get("id")
        whole = whole_number(number)
        color = color if isinstance(color, list) else None  # some tools write "#rrggbb"
        entries.append((category.get("name"), color, True, number if whole is None else whole))
    if background:
        ids = [number for *_, number in entries]
        if any(label == BACKGROUND for label, *_ in entries):
            raise UserError(
                f"{path} has a category {BACKGROUND!r}, which all tasks but instance add themselves: rename it"
            )
        entries.append((BACKGROUND, [127, 127, 127], False, next(n for n in range(len(ids) + 1) if n not in ids)))
    return describe_classes(name, entries, path)


def _by_image(content: Content, path: Path, problems: list[str]) -> dict[str, list[Content]]:
    """The annotations by image id; those without image become problems."""
    ids = [str(image.get("id")) for image in content["images"]]
    for what, values in (
        ("image id", ids),
        ("annotation id", [str(a["id"]) for a in content["annotations"] if "id" in a]),
    ):
        repeated, times = Counter(values).most_common(1)[0] if values else ("", 0)
        if times > 1:
            raise UserError(f"{path} has the {what} {repeated} {times} times: give every one its own id")
    annotations: dict[str, list[Content]] = {image_id: [] for image_id in ids}
    for annotation in content["annotations"]:
        image_id = str(annotation.get("image_id"))
        if image_id in annotations:
            annotations[image_id].append(annotation)
        else:
            number = annotation.get("id")
            problems.append(
                f"{path}: annotation {number} is of the image_id {image_id}, which no image has: correct it"
            )
    return annotations


def _names(image: Content, path: Path) -> tuple[str, str]:
    """An image's file name, and its name in the data set: folders joined by underscores, without the suffix."""
    file_name = image.get("file_name")
    if not is_file_name(file_name):
        raise UserError(f"{path} has an image without file_name, or with one that no file can have: correct the JSON")
    return str(file_name), "_".join(PurePosixPath(str(file_name)).with_suffix("").parts)


def _size(image: Content) -> tuple[int, int]:
    """Height and width of an image; raises `ValueError` if the JSON does not say them."""
    height, width = whole_number(image.get("height")), whole_number(image.get("width"))
    if height is None or width is None or not (0 < height <= _FARTHEST and 0 < width <= _FARTHEST):
        raise ValueError(f"has the width {image.get('width')!r} and height {image.get('height')!r}, not its pixels")
    return height, width


def _object(annotation: Content, size: tuple[int, int], class_of: Mapping[int | None, int]) -> _Object:
    """Raises `ValueError` if an annotation says something wrong."""
    place = f"has the annotation {annotation.get('id')} with"
    class_id = class_of.get(whole_number(annotation.get("category_id")))
    if class_id is None:
        raise ValueError(f"{place} the category_id {annotation.get('category_id')!r}, which no category has")
    is_crowd = annotation.get("iscrowd", 0)
    if is_crowd not in (0, 1):
        raise ValueError(f"{place} iscrowd {is_crowd!r}, which is neither 0 nor 1")
    segmentation = annotation.get("segmentation")
    if not segmentation:
        raise ValueError(f"{place} no segmentation (a box alone is no mask: draw its outline or remove it)")
    polygons: list[list[int | float]] = []
    run_lengths = None
    if isinstance(segmentation, list):
        if not all(map(_is_polygon, segmentation)):
            raise ValueError(f"{place} a segmentation that is no list of polygons [[x1, y1, x2, y2, ...], ...]")
        polygons = [points for points in segmentation if len(points) >= 6]
    else:
        try:
            run_lengths = _run_lengths(segmentation, size)
        except ValueError as error:
            raise ValueError(f"{place} run lengths {error}") from error
    is_beyond = any(_is_beyond(points[0::2], points[1::2], size) for points in polygons)
    box = annotation.get("bbox")
    if isinstance(box, list) and len(box) == 4 and _is_polygon(box):
        left, top, width, height = box
        is_beyond |= _is_beyond([left, left + width], [top, top + height], size)
    return _Object(class_id, bool(is_crowd), polygons, run_lengths, is_beyond)


def _is_polygon(points: Any) -> bool:
    """Whether these are pairs of coordinates: finite numbers that an image can have."""
    if not isinstance(points, list) or len(points) % 2:
        return False
    return all(isinstance(v, int | float) and -_FARTHEST <= v <= _FARTHEST for v in points)


def _is_beyond(xs: Sequence[int | float], ys: Sequence[int | float], size: tuple[int, int]) -> bool:
    """By more than a pixel, since tools round differently."""
    height, width = size
    return min(*xs, *ys) < -1 or max(xs) > width + 1 or max(ys) > height + 1


def _run_lengths(segmentation: Any, size: tuple[int, int]) -> list[int]:
    """Checked, because pycocotools leaves pixels undefined that run lengths do not reach."""
    if not isinstance(segmentation, dict) or segmentation.get("size") != list(size):
        found = segmentation.get("size") if isinstance(segmentation, dict) else None
        raise ValueError(f"of the size {found}, while the image's height and width are {list(size)}")
    counts = segmentation.get("counts")
    if isinstance(counts, str):
        counts = _decompressed(counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("whose counts are neither whole numbers nor COCO's compressed text")
    if sum(counts) != size[0] * size[1]:
        raise ValueError(f"of {sum(counts)} pixels, while the image has {size[0] * size[1]}")
    return counts


def _decompressed(text: str) -> list[int]:
    """COCO's compressed run lengths: groups of 5 bits, from the third on as differences to the last but one."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits >> 4 & 1) << shift  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return [-1] if shift else counts


def _mask(described: _Object, height: int, width: int) -> dict[str, Any]:
    """An object's pixels as pycocotools' run lengths."""
    if described.run_lengths is not None:
        counts: dict[str, Any] = {"size": [height, width], "counts": described.run_lengths}
        return dict(coco_mask.frPyObjects(counts, height, width))
    if not described.polygons:
        return dict(coco_mask.encode(np.zeros((height, width), np.uint8, order="F")))
    return dict(coco_mask.merge(coco_mask.frPyObjects(described.polygons, height, width)))


def _order(objects: Sequence[_Object], areas: Sequence[int]) -> list[int]:
    """From the lowest to the one on top: crowds, then the larger before the smaller, then as listed."""
    return sorted(range(len(objects)), key=lambda i: (not objects[i].is_crowd, -areas[i]))


def _painted(
    masks: Sequence[dict[str, Any]], objects: Sequence[_Object], height: int, width: int
) -> Int32[np.ndarray, "height width"]:
    """The number of the object on top of every pixel, from 1 on; `VOID_ID` where there is none."""
    ids = np.full((height, width), VOID_ID, np.int32, order="F")  # as pycocotools' masks lie in memory
    for i in _order(objects, [int(coco_mask.area(m)) for m in masks]):
        ids[coco_mask.decode(masks[i]).view(bool)] = i + 1
    return np.ascontiguousarray(ids)
