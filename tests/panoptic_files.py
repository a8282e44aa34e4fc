"""Small files in the COCO panoptic format, for tests to write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pem_lightning.files import id_to_rgb

CATEGORIES = [
    {"id": 200, "name": "rug", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "toothbrush", "isthing": 1},
]


def segment(number: Any, category: Any, **more: Any) -> dict[str, Any]:
    """One entry of `segments_info`."""
    return {"id": number, "category_id": category, "iscrowd": 0, **more}


def write_panoptic(path: Path, images: dict[Any, tuple[Any, list[Any]]], **more: Any) -> Path:
    """Write a JSON and its folder of PNGs.

    Args:
        path: of the JSON.
        images: by image id, the id map and `segments_info`.
        more: other lists of the JSON, such as categories.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    annotations = []
    for image_id, (ids, segments) in images.items():
        name = f"{image_id}.png"
        Image.fromarray(id_to_rgb(np.asarray(ids, np.int32))).save(folder / name)
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    path.write_text(json.dumps({"annotations": annotations, **more}))
    return path
