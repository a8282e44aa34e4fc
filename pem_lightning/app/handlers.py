"""What the page does with photographs and videos, without Gradio."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import nn

from pem_lightning.files import id_to_rgb, write_file
from pem_lightning.images import PHOTO_FORMATS, Photo, read_photo
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.results import (
    SHOWN_SCORE,
    InstanceInfo,
    SegmentedImage,
    SegmentInfo,
    encode_png,
    official_class_map,
)
from pem_lightning.inference.sources import DEFAULT_FPS, VIDEO_SUFFIXES, VideoReader, VideoWriter
from pem_lightning.inference.visualize import RGB, as_array, overlay_colors
from pem_lightning.types import UserError

MAX_FPS = 30.0
"""Of a video that was taken faster, only so many frames a second are segmented."""
FASTEST = 120.0
"""A file that claims more frames per second than this does not know."""
_CONTAINERS = {
    4: (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"),
    0: (b"\x1aE\xdf\xa3", b"RIFF", b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"0&\xb2u"),
}
"""Where the first bytes of MP4 and MOV, and those of WebM, AVI, MPEG and WMV lie. Others may be playlists, whose
addresses FFmpeg would open."""


class Limits(NamedTuple):
    """What the page takes."""

    megabytes: float  # of a file
    pixels: int  # of a photograph, or of a frame
    seconds: float  # of a video


class Settings(NamedTuple):
    """What a visitor chooses; see `Predictor`. Without classes, all are shown."""

    task: str
    object_mask_threshold: float
    overlap_threshold: float
    score_threshold: float
    classes: tuple[str, ...]
    precision: str


class LegendRow(NamedTuple):
    """One class of a result."""

    name: str
    color: RGB
    share: float  # of the image's pixels, 0 to 1
    objects: int | None  # how many; None for classes that are not counted


class Segmented(NamedTuple):
    """A photograph's result, and how long its stages took in seconds."""

    result: SegmentedImage
    reading: float
    network: float  # post-processing included


class SegmentedVideo(NamedTuple):
    """How long a video took."""

    frames: int
    seconds: float


class Segmenter:
    """Segments what visitors hand in, with one network for each precision.

    Args:
        predictor: decides on whatever visitors cannot.
        make_network: the same network in another precision.
        precision: the predictor's.
        limits: of what is taken.
    """

    def __init__(
        self, predictor: Predictor, make_network: Callable[[str], nn.Module], precision: str, limits: Limits
    ) -> None:
        for name, limit in limits._asdict().items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
                raise UserError(f"max_{name}={limit}: give a number above 0")
        self.base = predictor
        self.make_network = make_network
        self.limits = limits
        self.default = Settings(
            predictor.inference.task,
            predictor.inference.object_mask_threshold,
            predictor.inference.overlap_threshold,
            SHOWN_SCORE,
            (),
            precision,
        )
        self.tasks = ("panoptic", "semantic", "instance") if predictor.info.thing_classes else ("panoptic", "semantic")
        self.stopped = threading.Event()
        """Ends videos that are under way."""
        self._networks = {precision: predictor.model}

    def predictor(self, settings: Settings) -> Predictor:
        """The predictor that a visitor has chosen.

        Raises:
            UserError: there is no such task, class or precision.
        """
        if settings.task not in self.tasks:
            raise UserError(f"this network has no task {settings.task}: choose one of {', '.join(self.tasks)}")
        if settings.precision not in self._networks:
            self._networks[settings.precision] = self.make_network(settings.precision)
        base = self.base
        return Predictor.from_parts(
            self._networks[settings.precision],
            base.info,
            TaskInference(
                settings.task,
                base.info.thing_classes,
                resize_first=base.inference.resize_first,
                object_mask_threshold=settings.object_mask_threshold,
                overlap_threshold=settings.overlap_threshold,
                top_k=base.inference.top_k,
            ),
            resize=base.resize,
            device=base.device,
            classes=settings.classes or None,
            score_threshold=settings.score_threshold,
            tile=base.tiled.tile,
            overlap=base.tiled.overlap,
        )

    def photo(self, path: str | Path, settings: Settings) -> Segmented:
        """Segment a photograph.

        Raises:
            UserError: it is too large, cannot be read, or a setting is impossible.
        """
        path = Path(path)
        start = time.perf_counter()
        with _named(path):
            self._check_megabytes(path)
            self._check_pixels(path.name, *_header_size(path))
            photo = read_photo(path)
        return self.again(photo, settings, time.perf_counter() - start)

    def again(self, photo: Photo, settings: Settings, reading: float = 0.0) -> Segmented:
        """Segment a photograph that has been read, in `reading` seconds."""
        predictor = self.predictor(settings)
        start = time.perf_counter()
        result = next(predictor.stream([photo]))
        return Segmented(result, reading, time.perf_counter() - start)

    def video(
        self,
        path: str | Path,
        settings: Settings,
        target: Path,
        alpha: int | float,
        progress: Callable[[float], object] = lambda fraction: None,
    ) -> SegmentedVideo:
        """Segment a video and write it with overlays.

        Args:
            path: of the video.
            settings: the visitor's.
            target: the .mp4 to write.
            alpha: opacity of the overlays, 0 to 1.
            progress: is told the fraction that is done.

        Raises:
            UserError: it is too large or too long, cannot be read, or a setting is impossible.
        """
        path = Path(path)
        with _named(path):
            self._check_megabytes(path)
            with path.open("rb") as file:
                head = file.read(16)
            if not any(head.startswith(start, place) for place, starts in _CONTAINERS.items() for start in starts):
                raise UserError(f"{path.name} is no video in MP4, MOV, WebM, AVI, MPEG or WMV: convert it to MP4")
            reader = VideoReader(path)
            self._check_pixels(path.name, *reader.size)
            fps = reader.fps if reader.fps <= FASTEST else DEFAULT_FPS
            limit = self.limits.seconds
            if reader.num_frames is not None and reader.num_frames > math.ceil(limit * fps):
                seconds = reader.num_frames / fps
                raise UserError(f"{path.name} lasts {seconds:.0f} seconds, and the limit is {limit:g}: shorten it")
            predictor = self.predictor(settings)
            every = math.ceil(fps / MAX_FPS)
            most = math.ceil(limit * fps / every)
            expected = most if reader.num_frames is None else min(-(-reader.num_frames // every), most)
            count, start = 0, time.perf_counter()
            with VideoWriter(target, fps / every) as writer:
                for result in predictor.stream(Photo(path.stem, f) for f in islice(reader.frames(every), most)):
                    if self.stopped.is_set():
                        raise UserError("the server stops")
                    writer.write(result.overlay(alpha, shade_things=False))
                    count += 1
                    progress(min(count / max(expected, 1), 1.0))
            if count == 0:
                raise UserError(f"{path.name} has no frame that can be read: check that it is a complete video")
        return SegmentedVideo(count, time.perf_counter() - start)

    def _check_megabytes(self, path: Path) -> None:
        megabytes = path.stat().st_size / 1e6
        if megabytes > self.limits.megabytes:
            limit = f"{self.limits.megabytes:g}"
            raise UserError(f"{path.name} has {megabytes:.1f} MB, and the limit is {limit}: shrink or shorten it")

    def _check_pixels(self, name: str, width: int, height: int) -> None:
        if width * height > self.limits.pixels:
            limit = f"{self.limits.pixels / 1e6:g}"
            raise UserError(f"{name} has {width} x {height} pixels, and the limit is {limit} million: shrink it")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Messages name the visitor's file, not its place on the server."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(str(path), path.name)) from error


def _header_size(path: Path) -> tuple[int, int]:
    """Width and height as the header has them; nothing is decoded. No pixels if there is no header."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # Pillow would refuse before it tells the size
    try:
        with Image.open(path, formats=PHOTO_FORMATS) as image:
            return image.size
    except Exception:  # a garbled file makes Pillow fail in any way; reading it says what is wrong
        return 0, 0
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_video(path: str | Path) -> bool:
    """Whether a file's name is a video's."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def legend(result: SegmentedImage) -> list[LegendRow]:
    """The classes that are drawn, the largest first."""
    id_map, segments = result.drawn
    areas = np.bincount(as_array(id_map).ravel())
    colors = overlay_colors(result.info)
    counted = result.semantic is None
    rows: dict[int, LegendRow] = {}
    for s in segments:
        area = int(areas[s.id]) if s.id < len(areas) else 0
        if not area:
            continue
        info = result.info.classes[s.class_id]
        row = rows.get(s.class_id) or LegendRow(
            info.name, colors[s.class_id], 0.0, 0 if counted and s.is_thing else None
        )
        count = None if row.objects is None else row.objects + 1
        rows[s.class_id] = row._replace(share=row.share + area / id_map.shape[0] / id_map.shape[1], objects=count)
    return sorted(rows.values(), key=lambda row: -row.share)


def found_at(result: SegmentedImage, x: int, y: int) -> SegmentInfo | InstanceInfo | None:
    """What is drawn at a pixel; of a class map the whole class."""
    height, width = result.image.shape[:2]
    if not (0 <= x < width and 0 <= y < height):
        return None
    if result.instances is not None:
        shown = (i for i in result.instances if i.score >= SHOWN_SCORE)
        return next((i for i in shown if bool(i.mask[y, x])), None)
    here = int(result.drawn[0][y, x])
    return next((s for s in result.described if s.id == here), None)


def write_overlay(result: SegmentedImage, folder: Path, alpha: int | float) -> Path:
    """`<name>_overlay.png`."""
    return write_file(folder / f"{result.name}_overlay.png", encode_png(result.overlay(alpha)))


def write_downloads(result: SegmentedImage, folder: Path) -> tuple[Path, Path]:
    """`<name>_ids.png`, with ids as colours as in COCO, or of a class map the official ids; and `<name>_coco.json`."""
    if result.semantic is not None:
        ids = official_class_map(result.semantic, result.info)
    else:
        ids = id_to_rgb(as_array(result.drawn[0]))
    return (
        write_file(folder / f"{result.name}_ids.png", encode_png(ids)),
        write_file(folder / f"{result.name}_coco.json", json.dumps(result.to_coco())),
    )


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for all temporary files of this process, which is removed at the end.

    Gradio makes files in its folder when it is imported, so this has to come first.
    """
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="pem_app_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before


def find_port(host: Any, port: Any) -> int:
    """The port to listen on; any free one for 0.

    Raises:
        UserError: it is taken, or host or port is impossible.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 65536:
        raise UserError(f"port={port}: give a number from 0 to 65535; 0 takes any free one")
    try:
        with socket.create_server((str(host), port)) as server:
            return server.getsockname()[1]
    except PermissionError as error:
        raise UserError(f"port={port} needs an administrator's rights: choose one above 1023") from error
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"host={host} is no address of this machine: choose 127.0.0.1 or 0.0.0.0") from error
        raise UserError(f"port={port} is taken: choose another, e.g. port={port % 65535 + 1}, or 0 for any") from error
