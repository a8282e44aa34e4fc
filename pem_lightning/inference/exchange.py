"""Results in the forms of other tools: supervision, COCO, LabelMe, CVAT. Needs no PyTorch, and no OpenCV.

Every form holds the same objects: the segments of a panoptic result, the instances, or the classes of a class map.
Masks are exact. So are polygons, which run along the edges of pixels, unless a tolerance simplifies them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np

from pem_lightning.basic_types import DatasetInfo, UserError, did_you_mean
from pem_lightning.files import write_file
from pem_lightning.inference.regions import Box, Region, encode_rle, outlines, region_of
from pem_lightning.inference.results import SegmentedImage, coco_categories
from pem_lightning.inference.visualize import as_array
from pem_lightning.shapes import Bool, Float64

Polygon = Float64[np.ndarray, "points 2"]
"""x and y of its corners in pixels: 0 is the image's left or upper edge, and a pixel's right edge is 1 further on."""


class Outline(NamedTuple):
    """The polygons around one object: one for each of its parts that do not touch."""

    name: str  # of the class
    class_id: int
    score: float | None  # confidence in [0, 1]; None for classes of a class map
    polygons: list[Polygon]


class _Object(NamedTuple):
    mask: Bool[np.ndarray, "height width"]
    class_id: int
    name: str
    score: float | None
    area: int
    box: Box


def _objects(result: SegmentedImage) -> Iterator[_Object]:
    """What a result has found, without what has no pixel."""
    if result.instances is not None:
        for i in result.instances:
            yield _Object(as_array(i.mask), *i[1:])
    if result.panoptic is not None:
        ids = as_array(result.panoptic)
        for s in result.segments:
            yield _Object(ids == s.id, s.class_id, s.name, s.score, s.area, s.box)
    if result.semantic is not None:
        classes = as_array(result.semantic)
        for k, name in enumerate(result.info.class_names):
            if (region := region_of(mask := classes == k)) is not None:
                yield _Object(mask, k, name, None, *region)


def _polygons(found: _Object, tolerance: int | float) -> list[Polygon]:
    """Only the object's box is looked at."""
    mask = found.mask[Region(found.area, found.box).window]
    corner = np.array(found.box[:2], np.float64)
    return [outline + corner for outline in outlines(mask, tolerance)]


def polygons(result: SegmentedImage, tolerance: int | float = 0) -> list[Outline]:
    """The outlines of every segment or instance, or of every class of a class map.

    A polygon has no holes. A hole is joined to the outline by a seam without width, so that filling the polygon leaves
    it open.

    Args:
        result: of an image.
        tolerance: see `regions.outlines`; 0 keeps every corner.

    Raises:
        UserError: a tolerance above 0 needs OpenCV.
    """
    return [Outline(f.name, f.class_id, f.score, _polygons(f, tolerance)) for f in _objects(result)]


def to_supervision(result: SegmentedImage) -> Any:
    """As `supervision.Detections` with masks; `data["class_name"]` has the names.

    Boxes are half-open: right and bottom are the first pixels outside. The classes of a class map have no confidence.

    Raises:
        UserError: supervision is not installed.
    """
    try:
        from supervision import Detections
    except ImportError as error:
        raise UserError("to_supervision() needs the package supervision: pip install supervision") from error
    found = list(_objects(result))
    scores = [f.score for f in found]
    return Detections(
        xyxy=np.array([f.box for f in found], np.float32).reshape(-1, 4),
        mask=np.array([f.mask for f in found], bool).reshape(-1, *result.image.shape[:2]),
        class_id=np.array([f.class_id for f in found], int),
        confidence=None if None in scores else np.array(scores, np.float32),
        data={"class_name": np.array([f.name for f in found], str)},
    )


class Coco:
    """Collects results as COCO's `instances_*.json` has them: images, annotations and all categories.

    Categories have the data set's own ids. Masks are run lengths unless polygons are wanted, see `polygons`; areas and
    boxes are those of the masks in either case.
    """

    def __init__(self, polygons: bool = False, tolerance: int | float = 0) -> None:
        self.polygons, self.tolerance = polygons, tolerance
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}

    def add(self, result: SegmentedImage) -> None:
        """Add an image."""
        images, annotations = self.content["images"], self.content["annotations"]
        height, width = result.image.shape[:2]
        images.append({"id": len(images) + 1, "file_name": _file_name(result), "width": width, "height": height})
        self.content["categories"] = coco_categories(result.info)
        for found in _objects(result):
            shape: Any = None
            if self.polygons:
                shape = [polygon.ravel().tolist() for polygon in _polygons(found, self.tolerance)]
            left, top, right, bottom = found.box
            annotation = {
                "id": len(annotations) + 1,
                "image_id": len(images),
                "category_id": result.info.classes[found.class_id].category_id,
                "segmentation": shape or {"size": [height, width], "counts": encode_rle(found.mask)},
                "area": found.area,
                "bbox": [left, top, right - left, bottom - top],
                "iscrowd": 0,
            }
            annotations.append(annotation if found.score is None else {**annotation, "score": found.score})

    def merge(self, text: str) -> None:
        """Add what another one has collected; its ids go on from those that are here."""
        content = json.loads(text)
        images, annotations = self.content["images"], self.content["annotations"]
        before, first = len(images), len(annotations)
        images += [{**image, "id": image["id"] + before} for image in content["images"]]
        for one in content["annotations"]:
            annotations.append({**one, "id": one["id"] + first, "image_id": one["image_id"] + before})
        self.content["categories"] = content["categories"]

    def __str__(self) -> str:
        return json.dumps(self.content)


def to_labelme(result: SegmentedImage, image_path: str | None = None, tolerance: int | float = 0) -> dict[str, Any]:
    """As the content of a LabelMe file, with polygons. Those of one object share a `group_id`.

    Args:
        result: of an image.
        image_path: where the image lies, seen from the LabelMe file; by default beside it.
        tolerance: see `polygons`.

    Raises:
        UserError: a tolerance above 0 needs OpenCV.
    """
    height, width = result.image.shape[:2]
    shapes = []
    for number, outline in enumerate(polygons(result, tolerance), start=1):
        group = number if len(outline.polygons) > 1 else None
        score = {} if outline.score is None else {"score": outline.score}
        for polygon in outline.polygons:
            shape = {"label": outline.name, "points": polygon.tolist(), "group_id": group, "shape_type": "polygon"}
            shapes.append({**shape, "flags": {}, **score})
    return {
        "version": "5.4.1",  # of LabelMe, which wants one
        "flags": {},
        "shapes": shapes,
        "imagePath": image_path or _file_name(result),
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def to_coco(result: SegmentedImage, polygons: bool = False, tolerance: int | float = 0) -> dict[str, Any]:
    """One image as `Coco` has it."""
    collected = Coco(polygons, tolerance)
    collected.add(result)
    return collected.content


class Cvat:
    """Collects results as XML of CVAT's own format, "CVAT for images 1.1", whose masks lose nothing.

    In a task with images of these names and labels with the classes' names choose Upload annotations, CVAT 1.1. Objects
    with higher scores lie above others. With `polygons` the polygons of one object are a group.
    """

    def __init__(self, polygons: bool = False, tolerance: int | float = 0) -> None:
        self.polygons, self.tolerance = polygons, tolerance
        self.root = ElementTree.Element("annotations")
        ElementTree.SubElement(self.root, "version").text = "1.1"
        self.count = 0

    def add(self, result: SegmentedImage) -> None:
        """Add an image."""
        if self.count == 0:
            _add_cvat_labels(self.root, result.info)
        height, width = map(str, result.image.shape[:2])
        place = {"id": str(self.count), "name": _file_name(result), "width": width, "height": height}
        image = ElementTree.SubElement(self.root, "image", place)
        self.count += 1
        found = sorted(_objects(result), key=lambda one: one.score or 0)
        for number, one in enumerate(found, start=1):
            common = {"label": one.name, "source": "auto", "occluded": "0", "z_order": str(number - 1)}
            if not self.polygons:
                ElementTree.SubElement(image, "mask", {**common, **_cvat_mask(one)})
                continue
            parts = _polygons(one, self.tolerance)
            group = {"group_id": str(number)} if len(parts) > 1 else {}
            for part in parts:
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in part.tolist())
                ElementTree.SubElement(image, "polygon", {**common, **group, "points": points})

    def merge(self, text: str) -> None:
        """Add what another one has collected."""
        other = ElementTree.fromstring(text)
        if self.count == 0:
            self.root.extend(other.iterfind("meta"))
        for image in other.iterfind("image"):
            image.set("id", str(self.count))
            self.root.append(image)
            self.count += 1

    def __str__(self) -> str:
        ElementTree.indent(self.root)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(self.root, encoding="unicode") + "\n"


def to_cvat(result: SegmentedImage, polygons: bool = False, tolerance: int | float = 0) -> str:
    """One image as `Cvat` has it."""
    collected = Cvat(polygons, tolerance)
    collected.add(result)
    return str(collected)


def _add_cvat_labels(root: ElementTree.Element, info: DatasetInfo) -> None:
    labels = root
    for name in ("meta", "task", "labels"):
        labels = ElementTree.SubElement(labels, name)
    for c in info.classes:
        label = ElementTree.SubElement(labels, "label")
        ElementTree.SubElement(label, "name").text = c.name
        ElementTree.SubElement(label, "color").text = "#{:02x}{:02x}{:02x}".format(*c.color)


def _cvat_mask(found: _Object) -> dict[str, str]:
    """Run lengths of the object's box, row after row, background first. (CVAT's manual, XML annotation format)"""
    left, top, right, bottom = found.box
    values = found.mask[top:bottom, left:right].ravel()
    changes = np.flatnonzero(np.diff(values, prepend=False))
    lengths = np.diff(changes, prepend=0, append=values.size)
    box = {"left": left, "top": top, "width": right - left, "height": bottom - top}
    return {"rle": ",".join(map(str, lengths)), **{key: str(value) for key, value in box.items()}}


def _file_name(result: SegmentedImage) -> str:
    """The image's; an image that is from no file is taken for a JPEG of the result's name."""
    return f"{result.name}.jpg" if result.file is None else result.file.name


_ONE_FILE: dict[str, tuple[str, Callable[[], Coco | Cvat]]] = {
    "coco": ("coco.json", Coco),
    "coco_polygons": ("coco_polygons.json", partial(Coco, polygons=True)),
    "cvat": ("cvat.xml", Cvat),
}
"""Formats that have all images in one file: its name, and what collects them."""
FORMATS = (*_ONE_FILE, "labelme")


class ExchangeFiles:
    """Results in `FORMATS`: `labelme/<name>.json` for each, and a file with all of them in the other formats.

    Attributes:
        collected: what collects the latter, by the file's name.

    Raises:
        UserError: there is no such format.
    """

    def __init__(self, directory: Path, formats: Sequence[str]) -> None:
        for name in formats:
            if name not in FORMATS:
                hint = did_you_mean(str(name), FORMATS)
                raise UserError(f"there is no formats={name}{hint}; choose some of: {', '.join(FORMATS)}")
        self.directory, self.formats = directory, formats
        self.collected = self.collectors()

    def collectors(self) -> dict[str, Coco | Cvat]:
        """New ones, by the file's name."""
        return {file: make() for file, make in (_ONE_FILE[name] for name in self.formats if name in _ONE_FILE)}

    def image_files(self, result: SegmentedImage, image_path: str | None = None) -> dict[str, bytes]:
        """The files of one image: paths, seen from the directory, and contents.

        `image_path` is where the image lies, seen from there; by default the way to its file.
        """
        if "labelme" not in self.formats:
            return {}
        content = to_labelme(result, image_path or _way(self.directory / "labelme", result.file))
        return {f"labelme/{result.name}.json": json.dumps(content, ensure_ascii=False).encode()}

    def passing(self, results: Iterable[SegmentedImage]) -> Iterator[SegmentedImage]:
        """The same results, each noted before it is passed on; the files with all of them are written at the end.

        Raises:
            UserError: a file cannot be written.
        """
        for result in results:
            for collected in self.collected.values():
                collected.add(result)
            for name, content in self.image_files(result).items():
                write_file(self.directory / name, content)
            yield result
        for name, collected in self.collected.items():
            write_file(self.directory / name, str(collected))


def _way(folder: Path, file: Path | None) -> str | None:
    """A file's path seen from a folder; on another drive of Windows its absolute one."""
    if file is None:
        return None
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return file.absolute().as_posix()
