"""A photograph with what was found in it, and how that is written down."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Integer, UInt8, UInt16
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage
from torch import Tensor

from pem_lightning.errors import UserError
from pem_lightning.files import write_file
from pem_lightning.inference.postprocess import Instance
from pem_lightning.inference.visualize import overlay_panoptic, overlay_semantic
from pem_lightning.panoptic_png import id_to_rgb
from pem_lightning.rle import encode_mask
from pem_lightning.types import VOID_ID, DatasetInfo, Segment

SHOWN_SCORE = 0.5
"""Instances with a lower score are not drawn."""


@dataclass(frozen=True)
class SegmentedImage:
    """One photograph and its prediction, on the CPU and at the image's own size; tasks fill different fields.

    Attributes:
        name: the image's file name without suffix.
        image: the photograph, RGB.
        info: what the classes are.
        panoptic: segment id of every pixel (panoptic task).
        segments: what the ids mean (panoptic task).
        semantic: class index of every pixel (semantic task).
        instances: objects, which may overlap (instance task).
    """

    name: str
    image: UInt8[np.ndarray, "height width 3"]
    info: DatasetInfo
    panoptic: Int32[Tensor, "height width"] | None = None
    segments: tuple[Segment, ...] = ()
    semantic: Int32[Tensor, "height width"] | None = None
    instances: tuple[Instance, ...] | None = None

    def overlay(self, alpha: float = 0.55, draw_names: bool = True) -> UInt8[np.ndarray, "height width 3"]:
        """The prediction drawn over the photograph. See `overlay_panoptic`."""
        if self.semantic is not None:
            return overlay_semantic(self.image, self.semantic, self.info, alpha, draw_names)
        if self.panoptic is not None:
            return overlay_panoptic(self.image, self.panoptic, self.segments, self.info, alpha, draw_names)
        id_map, segments = stack_instances(self.instances or (), self.image.shape[:2])
        return overlay_panoptic(self.image, id_map, segments, self.info, alpha, draw_names)

    def save(self, directory: str | Path, name: str | None = None) -> list[Path]:
        """Writes `<name>_overlay.png` and the prediction itself.

        That is `<name>_panoptic.png` (ids as colours, as in COCO) with `<name>_segments.json`, or
        `<name>_semantic.png` (the data set's official ids), or `<name>_instances.json` (COCO results with RLE masks).

        Args:
            directory: is made if need be.
            name: instead of the result's own.

        Returns:
            The files.

        Raises:
            UserError: a file cannot be written.
        """
        stem = Path(directory) / (name or self.name)
        files: dict[str, bytes] = {}
        if self.panoptic is not None:
            files["_panoptic.png"] = encode_png(id_to_rgb(self.panoptic.numpy()))
            files["_segments.json"] = _json(segments_info(self.panoptic, self.segments, self.info))
        if self.semantic is not None:
            files["_semantic.png"] = encodeencode_png(official_class_map(self.semantic, self.info))
        if self.instances is not None:
            files["_instances.json"] = _json([coco_instance(i, self.name, self.info) for i in self.instances])
        written = [write_file(stem.with_name(stem.name + ending), content) for ending, content in files.items()]
        return [self.save_overlay(directory, name), *written]

    def save_overlay(self, directory: str | Path, name: str | None = None) -> Path:
        """Writes `<name>_overlay.png` alone; arguments and errors as of `save`."""
        return write_file(Path(directory) / f"{name or self.name}_overlay.png", encode_png(self.overlay()))


def write_coco_panoptic(
    results: Iterable[SegmentedImage], directory: str | Path, info: DatasetInfo, *, overlays: bool = False
) -> Path:
    """Writes panoptic results in COCO's format, as the official evaluators read it.

    Args:
        results: of the panoptic task, with unique names; consumed one by one, so a generator saves memory.
        directory: gets `panoptic.json` and `panoptic/<name>.png`.
        info: names and official ids of the classes.
        overlays: write `<name>_overlay.png`, too.

    Returns:
        The JSON file, which is written last.

    Raises:
        UserError: two images have the same name, or a file cannot be written.
        ValueError: a result is not panoptic.
    """
    directory = Path(directory)
    images: dict[str, dict[str, Any]] = {}
    annotations = []
    for result in results:
        if result.panoptic is None:
            raise ValueError(f"the result of {result.name} is not panoptic")
        if result.name in images:
            raise UserError(f"two images are named {result.name}: rename one of them, or write to two folders")
        file_name = f"{result.name}.png"
        write_file(directory / "panoptic" / file_name, encode_png(id_to_rgb(result.panoptic.numpy())))
        if overlays:
            result.save_overlay(directory)
        height, width = result.panoptic.shape
        images[result.name] = {"id": result.name, "file_name": file_name, "height": height, "width": width}
        annotations.append(
            {
                "image_id": result.name,
                "file_name": file_name,
                "segments_info": segments_info(result.panoptic, result.segments, info),
            },
        )
    categories = [
        {"id": c.official_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in info.classes
    ]
    content = {"images": list(images.values()), "annotations": annotations, "categories": categories}
    return write_file(directory / "panoptic.json", _json(content))


def segments_info(
    panoptic: Int32[Tensor, "height width"], segments: Iterable[Segment], info: DatasetInfo
) -> list[dict[str, Any]]:
    """COCO's description of every segment of a map; `bbox` is left, top, width and height in pixels."""
    ids = panoptic.numpy()
    boxes = ndimage.find_objects(ids)
    areas = np.bincount(ids.ravel())
    described = []
    for segment in segments:
        rows, columns = boxes[segment.id - 1]
        described.append(
            {
                "id": segment.id,
                "category_id": info.classes[segment.class_id].official_id,
                "area": int(areas[segment.id]),
                "bbox": [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start],
                "iscrowd": int(segment.is_crowd),
                "score": segment.score,
            }
        )
    return described


def coco_instance(instance: Instance, image_id: str | int, info: DatasetInfo) -> dict[str, Any]:
    """One entry of COCO's instance results."""
    rle = encode_mask(instance.mask)
    return {
        "image_id": image_id,
        "category_id": info.classes[instance.class_id].official_id,
        "segmentation": rle,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "score": instance.score,
    }


def stack_instances(
    instances: Iterable[Instance], size: tuple[int, ...]
) -> tuple[Int32[Tensor, "height width"], list[Segment]]:
    """The confident instances as an id map, the most confident on top."""
    id_map = torch.full(size, VOID_ID, dtype=torch.int32)
    segments = []
    shown = sorted((i for i in instances if i.score >= SHOWN_SCORE), key=lambda i: i.score)
    for segment_id, instance in enumerate(shown, start=1):
        id_map[instance.mask] = segment_id
        segments.append(Segment(segment_id, instance.class_id, is_thing=True, score=instance.score))
    return id_map, segments


def official_class_map(
    classes: Integer[Tensor, "height width"], info: DatasetInfo
) -> UInt8[np.ndarray, "height width"] | UInt16[np.ndarray, "height width"]:
    """The data set's official ids instead of class indices; 16 bits where 8 are too few."""
    official = np.array(info.official_ids)
    return official.astype(np.uint8 if official.max() < 256 else np.uint16)[classes.numpy()]


def encode_png(array: np.ndarray) -> bytes:
    """A picture or a map as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def _json(content: Any) -> bytes:
    return json.dumps(content).encode()
