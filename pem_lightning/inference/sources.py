"""Reading what people hand in: videos, cameras and streams (images: `pem_lightning.images`); and writing videos."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import cv2
import numpy as np

from pem_lightning.images import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from pem_lightning.images import Frame
from pem_lightning.images import ImageLike as ImageLike
from pem_lightning.images import find_images as find_images
from pem_lightning.images import read_image as read_image
from pem_lightning.types import UserError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
DEFAULT_FPS = 25.0  # of sources that do not say how fast they are
CODECS = ("ffmpeg", "avc1", "vp09", "mp4v")
"""H.264 by the program ffmpeg, and OpenCV's: H.264 and VP9, which browsers play, and MPEG-4 part 2, which they do not.
OpenCV's wheels have no H.264 for Linux."""
LARGEST_SIDE = 8190  # MPEG-4 part 2 has 13 bits for each side

log = logging.getLogger(__name__)

T = TypeVar("T")

# FFmpeg would print every fault itself; ours are one line each. Read when the first video is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


def is_stream(source: str | Path | int) -> bool:
    """Whether this is a camera's number or an address such as rtsp://..., and no file or folder has that name."""
    address = re.fullmatch(r"\d+|[A-Za-z][A-Za-z0-9+.-]+://.*", str(source))
    return address is not None and not os.path.exists(str(source))


def find_sources(source: str | Path | int | list[str | Path | int]) -> tuple[list[Path], list[str]]:
    """The images, and the videos and streams, of a file, a folder, a pattern, a camera, an address, or several.

    Raises:
        UserError: a file does not exist, or a folder or a pattern has none.
    """
    files: list[Path] = []
    videos: list[str] = []
    for one in source if isinstance(source, list) else [source]:
        if is_stream(one):
            videos.append(str(one))
            continue
        paths = find_images(str(one), IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        files += [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
        videos += [str(path) for path in paths if path.suffix.lower() in VIDEO_SUFFIXES]
    return files, videos


class VideoReader:
    """Reads a video file, a camera (by number; 0 is the first) or a stream (by address: rtsp://... or http://...).

    `dropped` counts the frames of a live source that came and went before one was asked for.

    Raises:
        UserError: it cannot be opened.
    """

    def __init__(self, source: str | Path | int) -> None:
        source = str(source)
        self._is_stream = is_stream(source)
        camera = self._is_stream and source.isdecimal()
        with _silent_opencv():
            self._capture = cv2.VideoCapture(int(source)) if camera else cv2.VideoCapture(source, cv2.CAP_FFMPEG)
        if not self._capture.isOpened():
            if camera:
                why = f"there is no camera {source}: connect it, or give another number or a file"
            elif self._is_stream:
                why = f"cannot open {source}: check the address and that the stream is running"
            elif not Path(source).is_file():
                why = f"video {source} does not exist: check the path"
            else:
                why = (
                    f"cannot open video {source}: it is damaged or of a kind that OpenCV cannot read; convert it to MP4"
                )
            raise UserError(why)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0.1 <= fps <= 1000 else DEFAULT_FPS
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        # By the file's own account; None for cameras and streams without end.
        self.num_frames = round(count) if not camera and 0 < count < 1e9 else None
        self.dropped = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, by the source's own account."""
        sides = (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        width, height = (round(self._capture.get(side)) for side in sides)
        return width, height

    @property
    def is_live(self) -> bool:
        """Whether frames come by themselves, as from a camera, and would pile up if each of them waited."""
        return self._is_stream and self.num_frames is None

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """The frames from here to the first that cannot be read, or only every n-th of them.

        Of a live source only the newest is kept, so that whoever is slow gets old ones never; see `dropped`.
        """
        for frame in self._newest(every) if self.is_live else self._every(every):
            yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    def _every(self, every: int) -> Iterator[Frame]:
        index = 0
        while self._capture.grab():
            if index % every == 0:
                found, frame = self._capture.retrieve()
                if not found:
                    return
                yield frame
            index += 1

    def _newest(self, every: int) -> Iterator[Frame]:
        """A thread reads all frames as they come; each takes the place of the last one."""
        newest: deque[Frame] = deque(maxlen=1)
        changed = threading.Condition()
        ended, failures = threading.Event(), list[Exception]()

        def read() -> None:
            try:
                for frame in self._every(every):
                    with changed:
                        if ended.is_set():
                            return
                        self.dropped += len(newest)
                        newest.append(frame)
                        changed.notify()
            except Exception as error:  # is raised where the frames are used
                failures.append(error)
            with changed:
                ended.set()
                changed.notify()

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        try:
            while True:
                with changed:
                    changed.wait_for(lambda: newest or ended.is_set())
                    if not newest:
                        break
                    frame = newest.popleft()
                yield frame
        finally:
            ended.set()
            thread.join(timeout=1)  # a camera that sends nothing may keep it longer
        if failures:
            raise failures[0]


class _H264Encoder:
    """H.264 by PyAV, an optional package; used as OpenCV's writer."""

    def __init__(self, path: Path, fps: int | float, size: tuple[int, int]) -> None:
        import av

        self._file: Any = av.open(str(path), "w", options={"movflags": "+faststart"})
        self._stream: Any = self._file.add_stream("libx264", Fraction(fps).limit_denominator(1001))
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": "20"}
        self._to_frame = av.VideoFrame.from_ndarray

    def write(self, image: Frame) -> None:
        self._file.mux(self._stream.encode(self._to_frame(image, "bgr24")))

    def release(self) -> None:
        self._file.mux(self._stream.encode())
        self._file.close()


class _FFmpegEncoder:
    """H.264 by the program ffmpeg; used as OpenCV's writer. Raises OSError if there is none, or it has no H.264."""

    def __init__(self, path: Path, fps: int | float, size: tuple[int, int]) -> None:
        rate, sides = Fraction(fps).limit_denominator(1001), f"{size[0]}x{size[1]}"
        read = ("-f", "rawvideo", "-pix_fmt", "bgr24", "-video_size", sides, "-framerate", str(rate), "-i", "pipe:")
        encode = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "20", "-pix_fmt", "yuv420p")
        alone: Any = {"start_new_session": True}  # Ctrl-C must not end it before the last frame
        if sys.platform == "win32":
            alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        self._process: Any = subprocess.Popen(
            ["ffmpeg", "-v", "quiet", "-y", *read, *encode, "-movflags", "+faststart", f"file:{path}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **alone,
        )

    def write(self, image: Frame) -> None:
        self._process.stdin.write(image.tobytes())

    def release(self) -> None:
        try:
            self._process.stdin.close()
        finally:
            self._process.wait()


class VideoWriter:
    """Writes an .mp4 file that browsers play, if any of the encoders here can: H.264 or VP9 (see `CODECS`).

    Under its name there is only ever a whole one; without a frame nothing is written.
    """

    def __init__(self, path: Path, fps: int | float) -> None:
        self.path = path
        self.fps = fps
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._writer: Any = None  # a cv2.VideoWriter, or what is used as one
        self._size = (0, 0)

    def write(self, frame: Frame) -> None:
        """Add a frame at the first one's size. The codec needs even sides: the last row or column is repeated."""
        height, width = frame.shape[:2]
        if self._writer is None:
            self._size = width, height
            self._writer = self._open(width + width % 2, height + height % 2)
        if (width, height) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
            width, height = self._size
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        if width % 2 or height % 2:
            bgr = cv2.copyMakeBorder(bgr, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        try:
            self._writer.write(bgr)
        except OSError as error:
            raise UserError(f"cannot write {self.path}: make room or choose another output folder") from error

    def _open(self, width: int, height: int) -> Any:
        if max(width, height) > LARGEST_SIDE:
            raise UserError(
                f"cannot write {self.path}: a video of {width} x {height} is larger than {LARGEST_SIDE} pixels at a "
                "side; shrink it, or choose save=masks"
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary.touch()
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({error.strerror}): choose another output folder") from error
        size = width, height
        with suppress(ImportError, ValueError):  # no PyAV, or one without H.264
            return _H264Encoder(self._temporary, self.fps, size)
        for codec in CODECS:
            if self._works(codec, size):
                if codec == CODECS[-1]:
                    log.warning(
                        "this OpenCV writes neither H.264 nor VP9, so browsers will not play %s: pip install av, "
                        "install ffmpeg, or convert it",
                        self.path,
                    )
                return self._encoder(codec, size)
        self._temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {self.path}: this OpenCV has no encoder for it; pip install av, install ffmpeg or choose "
            "save=masks"
        )

    def _encoder(self, codec: str, size: tuple[int, int]) -> Any:
        if codec == "ffmpeg":
            return _FFmpegEncoder(self._temporary, self.fps, size)
        fourcc = cv2.VideoWriter.fourcc(*codec)
        with _silent_opencv():
            return cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, fourcc, self.fps, size)

    def _works(self, codec: str, size: tuple[int, int]) -> bool:
        """Whether a frame can be read again: an encoder may open and then fail, for its size or its hardware."""
        with suppress(OSError):  # there is no such program
            writer = self._encoder(codec, size)
            try:
                writer.write(np.zeros((size[1], size[0], 3), np.uint8))
            finally:
                writer.release()
        with _silent_opencv():
            return cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG).read()[0]

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the file, also after an error, and give it its name."""
        if self._writer is None:
            return
        with suppress(OSError):  # what is missing is noticed below
            self._writer.release()
        with _silent_opencv():  # OpenCV does not say when the disk is full
            whole = cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG).isOpened()
        if whole:
            with suppress(PermissionError):  # on Windows, if a player has the old one open
                self._temporary.replace(self.path)
                return
        self._temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {self.path}: make room, close what has it open, or choose another output folder"
        ) from error


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """OpenCV would print a line about each backend that fails."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)


@contextmanager
def prefetch(items: Iterable[T], depth: int = 3) -> Iterator[Iterator[T]]:
    """Let a thread take items from an iterable before they are used, at most `depth` of them.

    An error in the thread is raised where the items are used. When the context ends, so has the thread, and what
    `items` reads from may be closed.
    """
    iterator, end = iter(items), object()
    pool = ThreadPoolExecutor(1)
    waiting = deque(pool.submit(next, iterator, end) for _ in range(depth))

    def taken() -> Generator[T]:
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield cast(T, item)

    try:
        yield taken()
    finally:
        pool.shutdown(cancel_futures=True)
