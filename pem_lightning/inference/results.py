"""A photograph with its segmentation, and the files that both are written to."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from pem_lightning.basic_types import (
    IGNORE_INDEX,
    VOID_ID,
    DatasetInfo,
    Instance,
    Result,
    Segment,
    UserError,
    did_you_mean,
)
from pem_lightning.files import id_to_rgb, write_file
from pem_lightning.inference.regions import Box, Region, encode_rle, find_regions, index_map, opencv, region_of
from pem_lightning.inference.visualize import Picture, as_array, class_segments, overlay_panoptic
from pem_lightning.shapes import Bool, Int32, Integer, UInt8, UInt16

if TYPE_CHECKING:
    from pem_lightning.inference.exchange import Outline

SHOWN_SCORE = 0.5
"""Instances with a lower score are not drawn."""


class SegmentInfo(NamedTuple):
    """One segment of a panoptic result."""

    id: int  # the value of its pixels in the id map
    class_id: int
    name: str  # of the class
    is_thing: bool
    score: float | None  # confidence in [0, 1]
    area: int  # pixels
    box: Box


class InstanceInfo(NamedTuple):
    """One object of an instance result."""

    mask: Bool[Any, "height width"]
    class_id: int
    name: str  # of the class
    score: float  # confidence in [0, 1]
    area: int  # pixels
    box: Box


class SegmentedImage:
    """An image and its segmentation, on the CPU and at the image's own size.

    Attributes:
        name: the file name without suffix.
        image: RGB.
        info: the classes.
        panoptic: segment id of every pixel, `VOID_ID` where no segment is; None for other tasks.
        semantic: class index of every pixel, `IGNORE_INDEX` where there is none; None for other tasks.
        file: the image's, None if it is from none.

    Maps and masks are tensors from `Predictor`, and arrays from `deploy.Runtime`.
    """

    def __init__(
        self, name: str, image: Picture, info: DatasetInfo, result: Result, task: str, file: Path | None = None
    ) -> None:
        self.name = name
        self.file = file
        self.image = image
        self.info = info
        self.panoptic = result.panoptic
        self.semantic = result.semantic
        self._segments = result.segments
        self._instances = result.instances if task == "instance" else None

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        found = f"{len(self._segments)} segments" if self._instances is None else f"{len(self._instances)} instances"
        found = found if self.semantic is None else "a class map"
        return f"SegmentedImage({self.name!r}, {width} x {height}: {found})"

    @cached_property
    def segments(self) -> tuple[SegmentInfo, ...]:
        """What the ids of `panoptic` mean. Ids that no pixel has are left out."""
        return () if self.panoptic is None else tuple(_describe(self.panoptic, self._segments, self.info))

    @cached_property
    def drawn(self) -> tuple[Int32[Any, "height width"], tuple[Segment, ...]]:
        """What overlays show, whatever the task: id map and segments. See `class_segments`, `stack_instances`."""
        if self.semantic is not None:
            return class_segments(self.semantic, self.info)
        if self.panoptic is not None:
            return self.panoptic, self._segments
        return stack_instances(self._instances or (), self.image.shape[:2])

    @property
    def described(self) -> tuple[SegmentInfo, ...]:
        """The segments of `drawn`, without those that no pixel has."""
        return tuple(_describe(*self.drawn, self.info))

    @cached_property
    def instances(self) -> tuple[InstanceInfo, ...] | None:
        """Objects by falling score, without empty ones; None for the other tasks."""
        if self._instances is None:
            return None
        return tuple(
            InstanceInfo(i.mask, i.class_id, self.info.classes[i.class_id].name, i.score, *region)
            for i in self._instances
            if (region := region_of(as_array(i.mask))) is not None
        )

    def overlay(self, alpha: int | float = 0.55, draw_names: bool = True, shade_things: bool = True) -> Picture:
        """The segmentation drawn over the image. See `overlay_panoptic`."""
        return overlay_panoptic(self.image, *self.drawn, self.info, alpha, draw_names, shade_things)

    def save(
        self, directory: str | Path, name: str | None = None, *, masks: bool = True, overlay: bool = True
    ) -> list[Path]:
        """Write `<name>_overlay.png` and the result itself.

        The latter is `<name>_panoptic.png` (ids as colours, as in COCO) with `<name>_segments.json`, or
        `<name>_semantic.png` (see `official_class_map`), or `<name>_instances.json` (COCO results with RLE masks).

        Raises:
            UserError: a file cannot be written.
        """
        stem = Path(directory) / (name or self.name)
        files = self._files(masks, overlay)
        return [write_file(stem.with_name(stem.name + ending), content) for ending, content in files.items()]

    def _files(self, masks: bool, overlay: bool) -> dict[str, bytes]:
        """The ends of the names and the contents of what `save` writes."""
        files: dict[str, bytes] = {}
        if overlay:
            files["_overlay.png"] = encode_png(self.overlay())
        if masks and self.panoptic is not None:
            files["_panoptic.png"] = encode_png(id_to_rgb(as_array(self.panoptic)))
            files["_segments.json"] = _json(segments_info(self.panoptic, self._segments, self.info))
        if masks and self.semantic is not None:
            files["_semantic.png"] = encode_png(official_class_map(self.semantic, self.info))
        if masks and self.instances is not None:
            files["_instances.json"] = _json([coco_instance(i, self.name, self.info) for i in self.instances])
        return files

    # For other tools. `tolerance` simplifies polygons, see `exchange.polygons`.

    def polygons(self, tolerance: int | float = 0) -> list[Outline]:
        """The outlines of every segment or instance, or of every class of a class map. See `exchange.polygons`."""
        return _exchange().polygons(self, tolerance)

    def to_supervision(self) -> Any:
        """As `supervision.Detections`. See `exchange.to_supervision`."""
        return _exchange().to_supervision(self)

    def to_coco(self, *, polygons: bool = False, tolerance: int | float = 0) -> dict[str, Any]:
        """As COCO's annotations of a data set with this image. See `exchange.Coco`."""
        return _exchange().to_coco(self, polygons, tolerance)

    def to_labelme(self, image_path: str | None = None, *, tolerance: int | float = 0) -> dict[str, Any]:
        """As a LabelMe file's content. See `exchange.to_labelme`."""
        return _exchange().to_labelme(self, image_path, tolerance)

    def to_cvat(self, *, polygons: bool = False, tolerance: int | float = 0) -> str:
        """As XML that CVAT imports. See `exchange.Cvat`."""
        return _exchange().to_cvat(self, polygons, tolerance)


def _exchange() -> Any:
    """The module `exchange`, imported when it is asked for."""
    from pem_lightning.inference import exchange

    return exchange


class CocoPanoptic:
    """Collects panoptic results of unique names as COCO's `panoptic.json` has them."""

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info
        self.content: dict[str, Any] = {"images": [], "annotations": [], "categories": coco_categories(info)}

    def add(self, result: SegmentedImage) -> None:
        """Add an image."""
        assert result.panoptic is not None
        file_name = f"{result.name}.png"
        height, width = result.panoptic.shape
        image = {"id": result.name, "file_name": file_name, "height": height, "width": width}
        described = segments_info(result.panoptic, result._segments, self.info)
        annotation = {"image_id": result.name, "file_name": file_name, "segments_info": described}
        self.content["images"].append(image)
        self.content["annotations"].append(annotation)

    def merge(self, text: str) -> None:
        """Add what another one has collected, of the same classes."""
        content = json.loads(text)
        for key in ("images", "annotations"):
            self.content[key] += content[key]

    def __str__(self) -> str:
        return json.dumps(self.content)


def image_files(result: SegmentedImage, *, masks: bool = True, overlays: bool = True) -> dict[str, bytes]:
    """What `write_results` writes of one image: paths, seen from its folder, and contents."""
    files = {}
    if masks and result.panoptic is not None:
        files[f"panoptic/{result.name}.png"] = encode_png(id_to_rgb(as_array(result.panoptic)))
        masks = False
    return files | {f"{result.name}{ending}": content for ending, content in result._files(masks, overlays).items()}


def write_coco_panoptic(
    results: Iterable[SegmentedImage], directory: str | Path, info: DatasetInfo, *, overlays: bool = False
) -> Path:
    """Write panoptic results of unique names in COCO's format: `panoptic/<name>.png`, then `panoptic.json`.

    Raises:
        UserError: a file cannot be written.
    """
    directory = Path(directory)
    collected = CocoPanoptic(info)
    for result in results:
        for name, content in image_files(result, overlays=overlays).items():
            write_file(directory / name, content)
        collected.add(result)
    return write_file(directory / "panoptic.json", str(collected))


def coco_categories(info: DatasetInfo) -> list[dict[str, Any]]:
    """COCO's description of every class."""
    return [
        {"id": c.category_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in info.classes
    ]


def write_results(
    results: Iterable[SegmentedImage],
    task: str,
    info: DatasetInfo,
    directory: str | Path,
    *,
    masks: bool = True,
    overlays: bool = True,
) -> None:
    """Write results of unique names: panoptic ones by `write_coco_panoptic`, others by their `save`."""
    if masks and task == "panoptic":
        write_coco_panoptic(results, directory, info, overlays=overlays)
        return
    for result in results:
        for name, content in image_files(result, masks=masks, overlays=overlays).items():
            write_file(Path(directory) / name, content)


def segments_info(
    panoptic: Int32[Any, "height width"], segments: Iterable[Segment], info: DatasetInfo
) -> list[dict[str, Any]]:
    """COCO's description of every predicted segment of a map; `bbox` is left, top, width and height in pixels."""
    return [
        {
            "id": segment.id,
            "category_id": info.classes[segment.class_id].category_id,
            "area": segment.area,
            "bbox": _coco_box(segment.box),
            "iscrowd": 0,
            "score": segment.score,
        }
        for segment in _describe(panoptic, segments, info)
    ]


def coco_instance(instance: Instance | InstanceInfo, image_id: str | int, info: DatasetInfo) -> dict[str, Any]:
    """One entry of COCO's instance results."""
    mask = as_array(instance.mask)
    area, box = region_of(mask) or Region(0, (0, 0, 0, 0))
    return {
        "image_id": image_id,
        "category_id": info.classes[instance.class_id].category_id,
        "segmentation": {"size": list(mask.shape), "counts": encode_rle(mask)},
        "bbox": _coco_box(box),
        "area": area,
        "score": instance.score,
    }


def official_class_map(
    classes: Integer[Any, "height width"], info: DatasetInfo
) -> UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]:
    """The data set's official ids instead of class indices; 16 bits where 8 are too few.

    `IGNORE_INDEX` becomes 0 if no class has that id, else 255 or 65535.
    """
    ids = info.category_ids
    nothing = next(value for value in (0, 255, 65535) if value not in ids)
    table = np.full(IGNORE_INDEX + 1, nothing, np.uint8 if max(*ids, nothing) < 256 else np.uint16)
    table[: len(ids)] = ids
    return table[as_array(classes)]


def stack_instances(
    instances: Iterable[Instance], size: tuple[int, ...]
) -> tuple[Int32[np.ndarray, "height width"], tuple[Segment, ...]]:
    """The confident instances as an id map, the most confident on top."""
    id_map = np.full(size, VOID_ID, np.int32)
    segments = []
    shown = sorted((i for i in instances if i.score >= SHOWN_SCORE), key=lambda i: i.score)
    for segment_id, instance in enumerate(shown, start=1):
        id_map[as_array(instance.mask)] = segment_id
        segments.append(Segment(segment_id, instance.class_id, is_thing=True, score=instance.score))
    return id_map, tuple(segments)


def encode_png(array: np.ndarray) -> bytes:
    """An RGB or grey picture as a PNG file.

    OpenCV's default is 6 times as fast as Pillow's, and a fifth larger; without OpenCV, Pillow's fastest.
    """
    if cv2 := opencv():
        if array.ndim == 3:
            array = cv2.cvtColor(array, cv2.COLOR_RGB2BGR)
        return cv2.imencode(".png", array)[1].tobytes()
    Image.fromarray(array).save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


def find_classes(names: Iterable[str], info: DatasetInfo) -> frozenset[int]:
    """Class indices by name."""
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in info.class_names:
            hint = did_you_mean(str(name), info.class_names)
            raise UserError(f"there is no class {name}{hint}; choose from: {', '.join(info.class_names)}")
    return frozenset(info.class_names.index(name) for name in wanted)


def only_classes(result: Result, classes: Collection[int]) -> Result:
    """A result of arrays without what belongs to other classes."""
    segments = tuple(s for s in result.segments if s.class_id in classes)
    panoptic, semantic = result.panoptic, result.semantic
    if panoptic is not None:
        panoptic = np.where(np.isin(panoptic, [s.id for s in segments]), panoptic, np.int32(VOID_ID))
    if semantic is not None:
        semantic = np.where(np.isin(semantic, sorted(classes)), semantic, np.int32(IGNORE_INDEX))
    return Result(semantic, panoptic, segments, tuple(i for i in result.instances if i.class_id in classes))


def _describe(
    panoptic: Int32[Any, "height width"], segments: Iterable[Segment], info: DatasetInfo
) -> Iterator[SegmentInfo]:
    """Segments with names, areas and boxes; those without a pixel are left out."""
    listed = list(segments)
    index = index_map(as_array(panoptic), [s.id for s in listed])
    for s, region in zip(listed, find_regions(index, len(listed)), strict=True):
        if region is not None:
            yield SegmentInfo(s.id, s.class_id, info.classes[s.class_id].name, s.is_thing, s.score, *region)


def _coco_box(box: Box) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()
