"""Makes ADE20K's panoptic annotation, COCO panoptic PNGs and JSON, from its semantic and instance maps.

The files are those that Mask2Former's preparation makes, so that either can be used, but for the numbers of the ids and
the areas: here those of the pixels that a segment keeps.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8
from PIL import Image, PngImagePlugin
from rich.progress import track

from pem_lightning.data.ade20k import ADE20K, ADE20K_PANOPTIC, DOWNLOAD, FOLDERS, PANOPTIC, find_files
from pem_lightning.data.dataset import pair_files, read_map, read_pair
from pem_lightning.files import id_to_rgb, write_file
from pem_lightning.types import VOID_ID, UserError

FORMAT_VERSION = 1
"""Raised whenever the files' content changes, so that old ones are made anew."""

_INSTANCES = (
    "download sceneparsing.csail.mit.edu/data/ChallengeData2017/annotations_instance.tar and unpack it in the folder "
    "ADEChallengeData2016"
)
_KEY = "ade20k_panoptic"
"""Of the PNG's text chunk that holds its segments, so that both are written at once and a finished image is known."""

_FIRST_INSTANCE = 256
"""Ids of instances are their number in the file plus this; those of stuff are the semantic map's values."""

_CLASS_OF_INSTANCE_CATEGORY = (-1, *sorted(ADE20K.thing_classes))
"""Categories of instances are the thing classes in their order, counted from 1."""

Segments = list[dict[str, Any]]


class SplitSummary(NamedTuple):
    """What was done for one split.

    Attributes:
        split: "train" or "val".
        images: how many there are.
        made: how many PNGs were made now; the others had been finished before.
        things: number of thing segments.
        stuff: number of stuff segments.
        hidden: how many segments of them are covered completely by others.
        seconds: it took.
        problems: files that could not be used, one message each; the JSON is only written if there are none.
    """

    split: str
    images: int
    made: int
    things: int
    stuff: int
    hidden: int
    seconds: float
    problems: list[str]


class _Image(NamedTuple):
    name: str
    photo: Path
    semantic: Path
    instances: Path
    target: Path


def merge(
    semantic: UInt8[np.ndarray, "height width"], instances: UInt8[np.ndarray, "height width 3"]
) -> tuple[Int32[np.ndarray, "height width"], Segments]:
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
        if not 0 < kind < len(_CLASS_OF_INSTANCE_CATEGORY):
            raise ValueError(f"instance {instance} has the category {kind}, but 1 to 100 are defined")
        if _FIRST_INSTANCE + instance in classes:
            raise ValueError(f"instance {instance} has several categories")
        classes[_FIRST_INSTANCE + instance] = _CLASS_OF_INSTANCE_CATEGORY[kind]
    ids = np.where(number > 0, number + _FIRST_INSTANCE, ids)
    return ids, [_segment(ids == value, value, class_id) for value, class_id in sorted(classes.items())]


def _segment(mask: np.ndarray, value: int, class_id: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = [0, 0, 0, 0]
    if rows.size:
        box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    area, bbox = int(mask.sum()), [int(length) for length in box]
    return {"id": value, "category_id": class_id, "area": area, "bbox": bbox, "iscrowd": 0}


def prepare_split(root: Path, split: str, workers: int) -> SplitSummary:
    """Make the PNGs of one split, and at last its JSON. What an interrupted call has finished is kept.

    Args:
        root: the folder `ADEChallengeData2016`.
        split: "train" or "val".
        workers: processes; 0 works in this one.

    Raises:
        UserError: a folder is missing, images and maps do not belong together, or a file cannot be written.
    """
    start = time.monotonic()
    jobs = _find(root, split)
    entries: dict[str, dict[str, Any]] = {}
    made, problems = 0, []
    with _mapped(_prepare_image, jobs, workers) as results:
        for name, entry, was_made, problem in track(results, f"ADE20K {split}", total=len(jobs)):
            if problem is not None:
                problems.append(problem)
            else:
                entries[name] = entry
                made += was_made
    if not problems:
        write_file(root / f"{PANOPTIC[split]}.json", json.dumps(_panoptic_json([entries[job.name] for job in jobs])))
    segments = [segment for entry in entries.values() for segment in entry["segments_info"]]
    things = sum(segment["category_id"] in ADE20K.thing_classes for segment in segments)
    hidden = sum(segment["area"] == 0 for segment in segments)
    seconds = time.monotonic() - start
    return SplitSummary(split, len(jobs), made, things, len(segments) - things, hidden, seconds, sorted(problems))


def _find(root: Path, split: str) -> list[_Image]:
    folder = FOLDERS[split]
    photos = find_files(root / "images" / folder, "jpg", DOWNLOAD)
    semantic, problems = pair_files(photos, find_files(root / "annotations" / folder, "png", DOWNLOAD), DOWNLOAD)
    instances, more = pair_files(
        photos, find_files(root / "annotations_instance" / folder, "png", _INSTANCES), _INSTANCES
    )
    if problems := problems + more:
        raise UserError(f"{problems[0]} ({len(problems)} such file(s))")
    target = root / PANOPTIC[split]
    return [_Image(name, *semantic[name], instances[name][1], target / f"{name}.png") for name in semantic]


@contextmanager
def _mapped(function: Callable[[Any], Any], jobs: Iterable[Any], workers: int) -> Iterator[Iterator[Any]]:
    """Results as they are finished; what has not been started is dropped when the block is left early."""
    if workers == 0:
        yield map(function, jobs)
        return
    executor = ProcessPoolExecutor(workers)
    try:
        yield (future.result() for future in as_completed([executor.submit(function, job) for job in jobs]))
    finally:
        executor.shutdown(cancel_futures=True)


def _prepare_image(job: _Image) -> tuple[str, dict[str, Any], bool, str | None]:
    """Name, entry of the JSON, whether its PNG was made now, and what is wrong with the files."""
    try:
        sources = _fingerprint(job)
        if (entry := _finished(job.target, sources)) is not None:
            return job.name, entry, False, None
        return job.name, _make(job, sources), True, None
    except UserError as error:
        return job.name, {}, False, str(error)


def _make(job: _Image, sources: list[Any]) -> dict[str, Any]:
    photo, semantic = read_pair(job.photo, job.semantic, DOWNLOAD)
    instances = read_map(job.instances, _INSTANCES)
    if instances.shape != photo.shape:
        raise UserError(f"{job.instances} is no RGB map of its image's size: {_INSTANCES}")
    try:
        ids, segments = merge(semantic, instances)
    except ValueError as error:
        raise UserError(f"{job.semantic} and {job.instances} cannot be merged, {error}: {_INSTANCES}") from error
    height, width = ids.shape
    entry = {
        "height": height,
        "width": width,
        "photo": job.photo.name,
        "map": job.target.name,
        "segments_info": segments,
    }
    text = PngImagePlugin.PngInfo()
    text.add_text(_KEY, json.dumps({"sources": sources, **entry}))
    buffer = io.BytesIO()
    Image.fromarray(id_to_rgb(ids)).save(buffer, "PNG", pnginfo=text)
    write_file(job.target, buffer.getvalue())
    return entry


def _fingerprint(job: _Image) -> list[Any]:
    """Tells when a PNG has been made from other files, or by another version."""
    stats = [path.stat() for path in (job.photo, job.semantic, job.instances)]
    return [FORMAT_VERSION, *([stat.st_size, stat.st_mtime_ns] for stat in stats)]


def _finished(target: Path, sources: list[Any]) -> dict[str, Any] | None:
    """The entry of a PNG that is there, if it was made from these files."""
    try:
        with Image.open(target) as file:
            entry = json.loads(file.info[_KEY])
    except (OSError, SyntaxError, KeyError, ValueError):
        return None
    return entry if entry.pop("sources", None) == sources else None


def _panoptic_json(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    images, annotations = [], []
    for entry in entries:
        number = Path(entry["photo"]).stem
        size = {"height": entry["height"], "width": entry["width"]}
        images.append({"id": number, "file_name": entry["photo"], **size})
        annotations.append({"image_id": number, "file_name": entry["map"], "segments_info": entry["segments_info"]})
    categories = [
        {"id": c.category_id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)}
        for c in ADE20K_PANOPTIC.classes
    ]
    return {"images": images, "annotations": annotations, "categories": categories}
