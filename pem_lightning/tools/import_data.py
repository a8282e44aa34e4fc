"""Import annotations of other formats: `python scripts/import_data.py FORMAT SOURCE DESTINATION`.

    yolo-seg   Ultralytics' data.yaml with images/ and labels/, polygons in the labels
    labelme    LabelMe's JSON files beside their images
    cvat       "CVAT for images": annotations.xml and the images        (extra `import`)
    voc        Pascal VOC: SegmentationObject, SegmentationClass, ...   (extra `import`)

DESTINATION is a new folder that `dataset=coco_instances dataset.root=DESTINATION` reads without further keys, or with
`--semantic` one for `dataset=semantic_folder`. Images are copied. It appears at once when all is done, or not at all.
Exit code 0: done, 2: something is wrong with the files.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from pem_lightning.data.coco_instances import BACKGROUND
from pem_lightning.data.semantic_folder import IMAGE_SUFFIXES
from pem_lightning.files import is_system_file
from pem_lightning.installation import install_command, job_command, tool_command
from pem_lightning.types import IGNORE_INDEX, UserError

IGNORED = "ignored"
"""Pascal VOC's border around objects: void in a semantic folder, left out among objects."""
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
CIRCLE_POINTS = 64
FARTHEST = 100_000
"""In pixels, as dataset=coco_instances has it."""

Polygon = list[float]
"""x1, y1, x2, y2, ... in pixels."""


class Shape(NamedTuple):
    """One object: the union of its polygons, or its pixels as pycocotools' run lengths."""

    label: str
    polygons: list[Polygon]
    pixels: dict[str, Any] | None = None


class Item(NamedTuple):
    """One image: its file, its path within the data set, its part ("train", "val", or anything else), its objects.

    Later objects lie above earlier ones.
    """

    image: Path
    name: PurePosixPath
    split: str
    size: tuple[int, int]
    shapes: list[Shape]


class Imported(NamedTuple):
    """Class names in order, images, and how often something was left out."""

    classes: list[str]
    items: Iterable[Item]
    left_out: Counter[str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=tool_command("import_data"), description="Import annotations of other formats."
    )
    parser.add_argument("format", choices=sorted(READERS))
    parser.add_argument("source", type=Path, help="the folder of the data set as it was exported")
    parser.add_argument("destination", type=Path, help="the folder to make")
    parser.add_argument("--semantic", action="store_true", help="write class maps instead of objects")
    parser.add_argument(
        "--val", type=float, default=0.2, help="share of the images to validate on, where the source has no such part"
    )
    parsed = parser.parse_args(arguments)
    try:
        import_data(parsed.format, parsed.source, parsed.destination, semantic=parsed.semantic, val_share=parsed.val)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def import_data(kind: str, source: Path, destination: Path, *, semantic: bool, val_share: float) -> None:
    """Read a data set of another format and write it as ours, all of it or nothing."""
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give the one that the annotation tool exported")
    if destination.exists() and (not destination.is_dir() or not all(map(is_system_file, destination.iterdir()))):
        raise UserError(f"{destination} exists and is not empty: give a new folder")
    if not 0 < val_share < 1:
        raise UserError(f"--val {val_share} is no share: give a number between 0 and 1")
    imported = READERS[kind](source)
    items = list(imported.items)
    parts = divided(items, val_share, imported.left_out)
    if not any(item.shapes for item in items):
        raise UserError(f"{source} has no outlines of objects: {kind} needs polygons or masks, boxes are not enough")
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".tmp", dir=destination.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp lets nobody else in
        for split, part in parts.items():
            (write_semantic if semantic else write_coco)(temporary, split, part, imported.classes)
        if destination.exists():  # and empty; Windows replaces no folder
            for path in filter(is_system_file, list(destination.iterdir())):
                path.unlink()
            destination.rmdir()
        temporary.replace(destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for what, times in imported.left_out.items():
        print(f"left out: {times} {what}")
    counts = ", ".join(f"{len(part)} {split}" for split, part in parts.items())
    reader = "dataset=semantic_folder" if semantic else "dataset=coco_instances task=instance"
    train = f"{job_command('train')} {reader} dataset.root={destination}"
    print(f"{counts} images with {len(imported.classes)} classes: {train}")


def divided(items: Sequence[Item], val_share: float, left_out: Counter[str]) -> dict[str, list[Item]]:
    """The parts "train" and "val" of the source if it has both; otherwise all images, divided by chance (seed 0)."""
    parts: dict[str, list[Item]] = {"train": [], "val": []}
    for item in items:
        if split := SPLITS.get(item.split.lower()):
            parts[split].append(item)
    if all(parts.values()):
        if others := len(items) - sum(map(len, parts.values())):
            left_out["images that are neither for training nor for validation"] += others
        return parts
    if len(items) < 2:
        raise UserError(f"{len(items)} image(s) cannot be divided into training and validation: give at least 2")
    count = min(max(round(val_share * len(items)), 1), len(items) - 1)
    chosen = set(np.random.default_rng(0).permutation(len(items))[:count].tolist())
    return {
        "train": [item for i, item in enumerate(items) if i not in chosen],
        "val": [item for i, item in enumerate(items) if i in chosen],
    }


# Writing.


def write_coco(root: Path, split: str, items: Sequence[Item], classes: Sequence[str]) -> None:
    """With COCO's own names, which are the defaults of dataset=coco_instances."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, item in enumerate(items, start=1):
        height, width = item.size
        copy_image(item, root / f"{split}2017")
        images.append({"id": image_id, "file_name": str(item.name), "height": height, "width": width})
        for shape in item.shapes:
            if shape.label == IGNORED:
                continue
            pixels = run_lengths(shape, item.size)
            segmentation: Any = shape.polygons
            if shape.pixels is not None:
                segmentation = {"size": [height, width], "counts": pixels["counts"].decode()}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": classes.index(shape.label) + 1,
                    "segmentation": segmentation,
                    "area": int(coco_mask.area(pixels)),
                    "bbox": coco_mask.toBbox(pixels).tolist(),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(classes, start=1)]
    path = root / "annotations" / f"instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def write_semantic(root: Path, split: str, items: Sequence[Item], classes: Sequence[str]) -> None:
    """Class 0 is the background; later objects lie on top."""
    names = [BACKGROUND, *(name for name in classes if name != BACKGROUND)]
    (root / "classes.yaml").write_text(json.dumps(names, ensure_ascii=False) + "\n", encoding="utf-8")
    for item in items:
        copy_image(item, root / "images" / split)
        values = np.zeros(item.size, np.uint8)
        for shape in item.shapes:
            value = IGNORE_INDEX if shape.label == IGNORED else names.index(shape.label)
            values[coco_mask.decode(run_lengths(shape, item.size)) > 0] = value
        path = (root / "labels" / split / item.name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def copy_image(item: Item, folder: Path) -> None:
    """Copy the image of an item to its place."""
    if item.name.is_absolute() or ".." in item.name.parts:
        raise UserError(f"the image {item.name} lies outside of its data set: export it anew")
    target = folder / item.name
    if target.exists():
        raise UserError(f"{item.image} and another image are both named {item.name}: rename one of them")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(item.image, target)


def run_lengths(shape: Shape, size: tuple[int, int]) -> dict[str, Any]:
    """An object's pixels."""
    return shape.pixels or dict(coco_mask.merge(coco_mask.frPyObjects(shape.polygons, *size)))


# Reading.


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image as it is shown, turned by its EXIF orientation."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the image {path} ({error}): put it there, or export the images, too") from error
    return (width, height) if turned else (height, width)


def numbers(values: Iterable[Any], place: str) -> Polygon:
    """Finite coordinates."""
    try:
        points = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise UserError(f"{place} has coordinates that are no numbers: export it anew") from error
    if len(points) % 2 or not all(-FARTHEST <= value <= FARTHEST for value in points):
        raise UserError(f"{place} has coordinates that are no pairs, or none of an image: export it anew")
    return points


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a data.yaml, its class names as a list."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path} ({' '.join(str(error).split())}): yolo-seg needs it") from error
    names = content.get("names") if isinstance(content, dict) else None
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path} has no list of class names: add names: [first, second, ...]")
    return {**content, "names": [str(name) for name in names]}


def read_yolo(source: Path) -> Imported:
    """Labels are in `labels/` where images are in `images/`; an image without label file has no objects."""
    config = read_yaml(source / "data.yaml")
    left_out: Counter[str] = Counter()
    items = []
    for split in ("train", "val", "test"):
        given = config.get(split) or (config.get("valid") if split == "val" else None)
        for value in [given] if isinstance(given, str) else given or []:
            folder, images = yolo_images(source, str(config.get("path") or ""), str(value))
            for image in images:
                size = size_of(image)
                inside = image.is_relative_to(folder) and ".." not in image.relative_to(folder).parts
                name = PurePosixPath(image.relative_to(folder) if inside else image.name)
                shapes = list(yolo_shapes(label_file(image), config["names"], size, left_out))
                items.append(Item(image, name, split, size, shapes))
    if not items:
        raise UserError(f"{source / 'data.yaml'} names no images: give train: and val: as folders below {source}")
    return Imported(config["names"], items, left_out)


def yolo_images(source: Path, base: str, value: str) -> tuple[Path, list[Path]]:
    """The folder and its images, or those that a text file lists. Roboflow writes ../train/images for train/images."""
    inside = Path(*(part for part in PurePosixPath(value.replace("\\", "/")).parts if part not in ("..", "/")))
    candidates = [source / base / value, source / value, source / inside]
    path = next((c for c in candidates if c.exists()), None)
    if path is None:
        raise UserError(f"{source / 'data.yaml'} names {value}, which does not exist: correct the path")
    if path.is_dir():
        return path, sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and not is_system_file(p))
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    images = [
        next((c for c in (path.parent / line, path.parent / base / line) if c.exists()), path.parent / line)
        for line in lines
    ]
    return path.parent, images


def label_file(image: Path) -> Path:
    """The last folder images/ in the path is labels/ for the label."""
    parts = list(image.parts)
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def yolo_shapes(path: Path, names: Sequence[str], size: tuple[int, int], left_out: Counter[str]) -> Iterator[Shape]:
    """Lines of a class index and the corners as shares of width and height."""
    if not path.is_file():
        return
    height, width = size
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        place = f"{path}, line {number},"
        fields = line.split()
        if not fields:
            continue
        if not fields[0].isdecimal() or int(fields[0]) >= len(names):
            raise UserError(f"{place} has the class {fields[0]!r}, but data.yaml names 0 to {len(names) - 1}")
        if len(fields) == 5:
            left_out["boxes without outline"] += 1
            continue
        points = numbers(fields[1:], place)
        if max(points, default=0) > 2:
            raise UserError(
                f"{place} has coordinates in pixels, not as shares of the image: divide by width and height"
            )
        if len(points) < 6:
            left_out["polygons of fewer than 3 points"] += 1
            continue
        yield Shape(names[int(fields[0])], [[v * (height if i % 2 else width) for i, v in enumerate(points)]])


def read_labelme(source: Path) -> Imported:
    """Classes in alphabetical order. A subfolder such as train/ or val/ is the part that its images belong to."""
    left_out: Counter[str] = Counter()
    items = []
    for path in sorted(p for p in source.rglob("*.json") if not is_system_file(p)):
        try:
            content = json.loads(path.read_bytes())
            entries, file_name = content["shapes"], PureWindowsPath(content["imagePath"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no LabelMe file (with shapes and imagePath): move it away") from error
        image = path.parent / file_name.as_posix()
        image = image if image.is_file() else path.parent / file_name.name
        size = size_of(image)
        if [content.get("imageHeight"), content.get("imageWidth")] not in ([None, None], list(size)):
            raise UserError(
                f"{path} is for an image of {content.get('imageWidth')}x{content.get('imageHeight')} pixels, but "
                f"{image} has {size[1]}x{size[0]}: give the image that was annotated"
            )
        folder, *_ = (*path.relative_to(source).parts[:-1], "")
        name = PurePosixPath(path.relative_to(source).with_name(image.name))
        items.append(Item(image, name, folder, size, labelme_shapes(entries, path, size, left_out)))
    if not items:
        raise UserError(f"{source} has no LabelMe files *.json: give the folder that holds them")
    return Imported(sorted({shape.label for item in items for shape in item.shapes}), items, left_out)


def labelme_shapes(entries: Any, path: Path, size: tuple[int, int], left_out: Counter[str]) -> list[Shape]:
    """Shapes of the same label and group are one object, as in LabelMe's own conversion to COCO."""
    shapes: dict[Any, Shape] = {}
    for index, entry in enumerate(entries):
        kind, label, place = entry.get("shape_type", "polygon"), str(entry.get("label")), f"{path}, shape {index},"
        points = numbers([value for point in entry.get("points") or [] for value in point], place)
        pixels = None
        if kind == "rectangle" and len(points) == 4:
            (left, right), (top, bottom) = sorted(points[0::2]), sorted(points[1::2])
            points = [left, top, right, top, right, bottom, left, bottom]
        elif kind == "circle" and len(points) == 4:
            radius = math.dist(points[:2], points[2:])
            angles = [2 * math.pi * step / CIRCLE_POINTS for step in range(CIRCLE_POINTS)]
            points = [v for a in angles for v in (points[0] + radius * math.cos(a), points[1] + radius * math.sin(a))]
        elif kind == "mask" and len(points) == 4:
            pixels = labelme_mask(entry.get("mask"), points, size, place)
        elif kind != "polygon" or len(points) < 6:
            left_out[f"shapes of the kind {kind} with {len(points) // 2} point(s)"] += 1
            continue
        group = entry.get("group_id")
        key = (label, index) if group is None else (label, "group", group)
        new = Shape(label, [], pixels) if pixels else Shape(label, [points])
        shapes[key] = joined(shapes[key], new, size) if key in shapes else new
    return list(shapes.values())


def labelme_mask(text: Any, points: Polygon, size: tuple[int, int], place: str) -> dict[str, Any]:
    """The run lengths of a PNG in base64 whose top left corner is the first point."""
    try:
        part = np.array(Image.open(io.BytesIO(base64.b64decode(text)))) > 0
        left, top = int(points[0]), int(points[1])
        mask = np.zeros(size, np.uint8, order="F")
        mask[top : top + part.shape[0], left : left + part.shape[1]] = part
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{place} has a mask that cannot be read: save the file again in LabelMe") from error
    return dict(coco_mask.encode(mask))


def joined(first: Shape, second: Shape, size: tuple[int, int]) -> Shape:
    """The union of two parts of one object."""
    if first.pixels is None and second.pixels is None:
        return Shape(first.label, first.polygons + second.polygons)
    return Shape(first.label, [], dict(coco_mask.merge([run_lengths(first, size), run_lengths(second, size)])))


def read_datumaro(source: Path, kind: str) -> Imported:
    """CVAT and Pascal VOC. Shapes of the same label and group are one object, as Datumaro's own export to COCO does."""
    try:
        import datumaro
        from datumaro import AnnotationType
    except ImportError as error:
        raise UserError(f"this format is read by Datumaro: {install_command('import')}") from error
    try:
        dataset = datumaro.Dataset.import_from(str(source), kind)
    except Exception as error:  # a library's own, of many kinds
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"cannot read {source} as {kind} ({reason}): give the folder as it was exported") from error
    labels = [label.name for label in dataset.categories()[AnnotationType.label]]
    left_out: Counter[str] = Counter()
    items = []
    for entry in dataset:
        image = Path(entry.media.path)
        size = size_of(image)
        shapes: dict[Any, Shape] = {}
        for index, part in enumerate(sorted(entry.annotations, key=lambda a: getattr(a, "z_order", 0))):
            if part.type not in (AnnotationType.polygon, AnnotationType.mask):
                left_out[f"annotations of the kind {part.type.name}, which is no outline"] += 1
                continue
            label = labels[part.label]
            if label == BACKGROUND:
                continue
            if part.type == AnnotationType.polygon:
                points = numbers(part.points, f"{source}: a polygon of {image}")
                if len(points) < 6:
                    left_out["polygons of fewer than 3 points"] += 1
                    continue
                new = Shape(label, [points])
            else:
                mask = np.asfortranarray(part.image, np.uint8)
                if mask.shape != size:
                    raise UserError(f"a mask of {image} has another size than the image: export the data set anew")
                new = Shape(label, [], dict(coco_mask.encode(mask)))
            key = (label, part.group) if part.group else (label, "single", index)
            shapes[key] = joined(shapes[key], new, size) if key in shapes else new
        name = PurePosixPath(f"{entry.id}{image.suffix}")
        items.append(Item(image, name, str(entry.subset), size, list(shapes.values())))
    if not items:
        raise UserError(f"{source} has no images that {kind} names: give the folder as it was exported")
    return Imported([name for name in labels if name not in (BACKGROUND, IGNORED)], items, left_out)


READERS: dict[str, Callable[[Path], Imported]] = {
    "yolo-seg": read_yolo,
    "labelme": read_labelme,
    "cvat": lambda source: read_datumaro(source, "cvat"),
    "voc": lambda source: read_datumaro(source, "voc_instance_segmentation"),
}
