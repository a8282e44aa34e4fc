"""Make ADE20K's panoptic annotation: `python scripts/prepare_ade20k.py data/ADEChallengeData2016 --workers 8`.

Writes `ade20k_panoptic_{train,val}/*.png` and `ade20k_panoptic_{train,val}.json` into the folder. The files are those
of Mask2Former's preparation but for ids and areas (here of the pixels that a segment keeps); either can be used. What
is finished is not made again. Exit code 0: done, 2: something is wrong with the files.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, PngImagePlugin

from pem_lightning.data.ade20k import ADE20K, ADE20K_PANOPTIC, DOWNLOAD, FOLDERS, PANOPTIC
from pem_lightning.data.coco import panoptic_json
from pem_lightning.data.dataset import find_files, map_parallel, pair_files, read_map, read_pair
from pem_lightning.files import id_to_rgb, write_file
from pem_lightning.installation import tool_command
from pem_lightning.processes import Interrupted
from pem_lightning.types import VOID_ID, UserError

FORMAT_VERSION = 1
"""Raised whenever the files' content changes, so that old ones are made anew."""
SHOWN = 20
"""So many problems of one split are printed."""
INSTANCES = (
    "download sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar and unpack it in the folder "
    "ADEChallengeData2016"
)
KEY = "ade20k_panoptic"
"""Of the PNG's text chunk that holds its segments: both are written at once, and a finished image is known."""
FIRST_INSTANCE = 256
"""Ids of instances are their number in the file plus this; those of stuff are the semantic map's values."""
CLASS_OF_INSTANCE_CATEGORY = (-1, *sorted(ADE20K.thing_classes))
"""Categories of instances are the thing classes in their order, counted from 1."""


Job = tuple[Path, Path, Path, Path]
"""Photograph, semantic map, instance map and target of one image."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=tool_command("prepare_ade20k"),
        description="Make ADE20K's panoptic annotation from its semantic and instance maps.",
    )
    parser.add_argument("root", type=Path, help="the folder ADEChallengeData2016, with annotations_instance in it")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 for none beside this one"
    )
    parsed = parser.parse_args(arguments)
    try:
        problems = [prepare_split(parsed.root, split, max(parsed.workers, 0)) for split in ("train", "val")]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as stop:
        print("interrupted: run the same command again to go on where it stopped", file=sys.stderr)
        return getattr(stop, "code", 130)
    return 2 if any(problems) else 0


def prepare_split(root: Path, split: str, workers: int = 0) -> list[str]:
    """Make the PNGs of one split, and at last its JSON; prints a summary. What an interrupted call has made is kept.

    Returns:
        Files that could not be used, one message each; the JSON is only written if there are none.
    """
    start = time.monotonic()
    jobs = find_jobs(root, split)
    outcomes = list(map_parallel(prepare_image, jobs, workers, f"ADE20K {split}"))
    problems = sorted(problem for _, _, problem in outcomes if problem)
    entries = [entry for entry, _, _ in outcomes if entry]
    made = sum(was_made for _, was_made, _ in outcomes)
    segments = [segment for entry in entries for segment in entry["segments_info"]]
    things = sum(segment["category_id"] in ADE20K.thing_classes for segment in segments)
    hidden = sum(segment["area"] == 0 for segment in segments)
    print(
        f"{split}: {len(jobs)} images ({made} made now, {len(entries) - made} had been made before), "
        f"{things} things and {len(segments) - things} stuff segments, {hidden} of them hidden by others, "
        f"{time.monotonic() - start:.0f} s"
    )
    for problem in problems[:SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        print(
            f"error: {len(problems)} images of {split} could not be used, its JSON has not been "
            "written: mend the files and run the same command again",
            file=sys.stderr,
        )
    else:
        write_file(root / f"{PANOPTIC[split]}.json", split_json(entries))
    return problems


def find_jobs(root: Path, split: str) -> list[Job]:
    """The images of a split, with their maps and the PNG to write."""
    folder = FOLDERS[split]
    photos = find_files(root / "images" / folder, ".jpg", DOWNLOAD)
    semantic, problems = pair_files(photos, find_files(root / "annotations" / folder, ".png", DOWNLOAD), DOWNLOAD)
    instance_files = find_files(root / "annotations_instance" / folder, ".png", INSTANCES)
    instances, more = pair_files(photos, instance_files, INSTANCES)
    if problems := problems + more:
        raise UserError(f"{problems[0]} ({len(problems)} such file(s))")
    return [
        (photo, semantic[name][1], instances[name][1], root / PANOPTIC[split] / f"{name}.png")
        for name, photo in sorted(photos.items())
    ]


def prepare_image(job: Job) -> tuple[dict[str, Any] | None, bool, str | None]:
    """Make the PNG of one image, unless it is there, made of these files by this version.

    Returns:
        Its entry for the JSON, whether it was made now, and what is wrong with its files.
    """
    try:
        stats = [path.stat() for path in job[:3]]
        sources = [FORMAT_VERSION, *([stat.st_size, stat.st_mtime_ns] for stat in stats)]
        if (entry := finished_entry(job[-1], sources)) is not None:
            return entry, False, None
        return make_png(job, sources), True, None
    except UserError as error:
        return None, False, str(error)


def finished_entry(target: Path, sources: list[Any]) -> dict[str, Any] | None:
    """The JSON entry that a PNG holds, if it was made from these files."""
    try:
        with Image.open(target) as file:
            entry = json.loads(file.info[KEY])
    except (OSError, SyntaxError, KeyError, ValueError):
        return None
    return entry if entry.pop("sources", None) == sources else None


def make_png(job: Job, sources: list[Any]) -> dict[str, Any]:
    """Write the panoptic map of an image; returns its entry for the JSON."""
    photo, semantic, instances, target = job
    pixels, classes = read_pair((photo, semantic), DOWNLOAD)
    numbers = read_map(instances, INSTANCES)
    if numbers.shape != pixels.shape:
        raise UserError(f"{instances} is no RGB map of its image's size: {INSTANCES}")
    try:
        ids, segments = merge(classes, numbers)
    except ValueError as error:
        raise UserError(f"{semantic} and {instances} cannot be merged, {error}: {INSTANCES}") from error
    height, width = ids.shape
    entry = {"height": height, "width": width, "photo": photo.name, "map": target.name, "segments_info": segments}
    text = PngImagePlugin.PngInfo()
    text.add_text(KEY, json.dumps({"sources": sources, **entry}))
    Image.fromarray(id_to_rgb(ids)).save(buffer := io.BytesIO(), "PNG", pnginfo=text)
    write_file(target, buffer.getvalue())
    return entry


def merge(
    semantic: UInt8[np.ndarray, "height width"], instances: UInt8[np.ndarray, "height width 3"]
) -> tuple[Int32[np.ndarray, "height width"], list[dict[str, Any]]]:
    """Stuff of the semantic map below, every instance on top; things of the semantic map are not used.

    Args:
        semantic: 0 void, 1 to 150 the classes.
        instances: red is the instance category (1 to 100, 0 none), green the instance's number in the image (0 none).

    Returns:
        The id map, and `segments_info` by rising id. A segment that is covered completely is listed with area 0.

    Raises:
        ValueError: a value is not defined, or an instance has several categories.
    """
    if (largest := int(semantic.max())) > ADE20K.num_classes:
        raise ValueError(f"the semantic map has the value {largest}, but 0 to {ADE20K.num_classes} are defined")
    is_stuff = np.array([False, *(not c.is_thing for c in ADE20K.classes)])
    ids = np.where(is_stuff[semantic], semantic, VOID_ID).astype(np.int32)
    classes = {value: value - 1 for value in np.unique(ids).tolist() if value != VOID_ID}
    category, number = (instances[..., channel].astype(np.int32) for channel in (0, 1))
    for pair in np.unique(number * 256 + category).tolist():
        instance, kind = divmod(pair, 256)
        if instance == 0:
            continue
        if not 0 < kind < len(CLASS_OF_INSTANCE_CATEGORY):
            raise ValueError(f"instance {instance} has the category {kind}, but 1 to 100 are defined")
        if FIRST_INSTANCE + instance in classes:
            raise ValueError(f"instance {instance} has several categories")
        classes[FIRST_INSTANCE + instance] = CLASS_OF_INSTANCE_CATEGORY[kind]
    ids = np.where(number > 0, number + FIRST_INSTANCE, ids)
    return ids, [describe_segment(ids == value, value, class_id) for value, class_id in sorted(classes.items())]


def describe_segment(mask: np.ndarray, value: int, class_id: int) -> dict[str, Any]:
    """COCO's description of a segment."""
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    bbox = [0, 0, 0, 0]
    if rows:
        bbox = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return {"id": value, "category_id": class_id, "area": int(mask.sum()), "bbox": bbox, "iscrowd": 0}


def split_json(entries: list[dict[str, Any]]) -> str:
    """The COCO panoptic JSON of a split."""
    images, annotations = [], []
    for entry in entries:
        number = Path(entry["photo"]).stem
        images.append({"id": number, "file_name": entry["photo"], "height": entry["height"], "width": entry["width"]})
        annotations.append({"image_id": number, "file_name": entry["map"], "segments_info": entry["segments_info"]})
    return panoptic_json(ADE20K_PANOPTIC, images, annotations)
