"""Frames of videos, cameras and streams, and videos of frames. Frames are RGB; the codec is OpenCV's business."""

from __future__ import annotations

import math
import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

# FFmpeg would print every fault itself; they are reported by us, once. Read when the first video is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np
from jaxtyping import UInt8

from pem_lightning.errors import UserError

DEFAULT_FPS = 25.0
"""Of sources that do not say how fast they are."""
CODEC = "mp4v"
LONGEST_GAP = 250
"""So many unreadable frames in a row end a video."""
LARGEST_SIDE = 8190
"""MPEG-4 part 2 has 13 bits for each side."""


def is_stream(source: str | Path | int) -> bool:
    """Whether this is a camera's number or an address such as rtsp://..., and no file."""
    return bool(re.fullmatch(r"\d+|[A-Za-z][A-Za-z0-9+.-]+://.*", str(source)))


class VideoReader:
    """Reads a video file, a camera or a stream, frame by frame.

    Args:
        source: a path, a camera's number (0 is the first), or an address such as rtsp://... or http://...

    Raises:
        UserError: it cannot be opened, or has no frame that can be read.

    Attributes:
        fps: frames per second.
        num_frames: how many the file says it has; None for cameras and streams without end.
        damaged: how many frames could not be read so far, although others came after them or should have.
    """

    def __init__(self, source: str | Path | int) -> None:
        self.source = str(source)
        camera = self.source.isdecimal()
        with _silent_opencv():
            self._capture = (
                cv2.VideoCapture(int(self.source)) if camera else cv2.VideoCapture(self.source, cv2.CAP_FFMPEG)
            )
        if not self._capture.isOpened():
            raise UserError(self._why_not(camera))
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0.1 <= fps <= 1000 else DEFAULT_FPS
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = round(count) if not camera and 0 < count < 1e9 else None
        self.damaged = 0

    def _why_not(self, camera: bool) -> str:
        if camera:
            return f"there is no camera {self.source}: connect it, or give another number or a file"
        if is_stream(self.source):
            return f"cannot open {self.source}: check the address and that the stream is running"
        if not Path(self.source).is_file():
            return f"video {self.source} does not exist: check the path"
        return f"cannot open video {self.source}: it is damaged or of a kind that OpenCV cannot read; convert it to MP4"

    @property
    def is_live(self) -> bool:
        """Whether frames come at their own pace: a camera or a stream without end."""
        return self.num_frames is None and is_stream(self.source)

    def frames(self, every: int = 1) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
        """The frames from here on.

        Args:
            every: only the first of so many.
        """
        index = failures = 0  # failures in a row
        while failures < LONGEST_GAP:
            frame = self._read() if index % every == 0 else None
            readable = frame is not None or (index % every > 0 and self._capture.grab())
            index += 1
            if readable:
                self.damaged, failures = self.damaged + failures, 0
                if frame is not None:
                    yield frame
                continue
            failures += 1
            # A frame may be damaged and those after it not. Only a file says whether there should be more.
            if index >= (self.num_frames or 0):
                break
        missing = failures + max((self.num_frames or 0) - index, 0)
        if self.num_frames is not None and missing > max(2, 0.01 * self.num_frames):  # some formats only guess
            self.damaged += missing

    def _read(self) -> UInt8[np.ndarray, "height width 3"] | None:
        found, frame = self._capture.read()
        return cv2.cvtColor(frame, cv2.COLOR_BGR2RGB) if found else None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._capture.release()


class VideoWriter:
    """Writes a video. Under its name there is never anything but a whole one, even if what makes the frames fails.

    Args:
        path: an .mp4 file; its folder is made if need be. Without a frame nothing is written.
        fps: frames per second.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, fps: int | float) -> None:
        self.path = path
        self.fps = fps
        self.num_frames = 0
        self._temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: UInt8[np.ndarray, "height width 3"], times: int = 1) -> None:
        """Add a frame. The first one decides on the size; later ones of another size are brought to it.

        The codec needs even sides: an odd one gets its last row or column twice.

        Raises:
            UserError: the file cannot be written, or the frame is too large for the codec.
        """
        height, width = frame.shape[:2]
        if self._writer is None:
            self._size = width, height
            self._writer = self._open(width + width % 2, height + height % 2)
        if (width, height) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)
        width, height = self._size
        if width % 2 or height % 2:
            bgr = cv2.copyMakeBorder(bgr, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
        for _ in range(times):
            self._writer.write(bgr)
        self.num_frames += times

    def _open(self, width: int, height: int) -> cv2.VideoWriter:
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
        codec = cv2.VideoWriter.fourcc(*CODEC)
        with _silent_opencv():
            writer = cv2.VideoWriter(str(self._temporary), cv2.CAP_FFMPEG, codec, self.fps, (width, height))
        if not writer.isOpened():
            self._temporary.unlink()
            raise UserError(f"cannot write {self.path}: this OpenCV has no {CODEC} encoder; choose save=masks")
        return writer

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish the file, whatever happened, and put it in its place."""
        if self._writer is None:
            return
        self._writer.release()
        with _silent_opencv():  # OpenCV does not say when the disk is full
            whole = cv2.VideoCapture(str(self._temporary), cv2.CAP_FFMPEG).isOpened()
        if whole:
            self._temporary.replace(self.path)
            return
        self._temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {self.path}: make room or choose another output folder") from error


class FrameRate:
    """How many frames per second pass by, lately and altogether."""

    def __init__(self) -> None:
        self.num_frames = 0
        self._start = time.perf_counter()
        self._lately: deque[float] = deque([self._start], maxlen=16)

    def tick(self) -> float:
        """Count a frame; returns the rate over the last ones."""
        self.num_frames += 1
        self._lately.append(time.perf_counter())
        return (len(self._lately) - 1) / max(self._lately[-1] - self._lately[0], 1e-9)

    @property
    def seconds(self) -> float:
        """From the start to the last frame."""
        return self._lately[-1] - self._start

    @property
    def overall(self) -> float:
        """The rate from the start to the last frame."""
        return self.num_frames / max(self.seconds, 1e-9)

    def due(self, fps: int | float) -> int:
        """How many frames a video of so many per second would have by the last frame."""
        return math.floor(self.seconds * fps)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turns the first Ctrl-C into an event, so that what is being written can be finished; a second one interrupts."""
    stopped = threading.Event()

    def stop(signum: int, frame: object) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield stopped
        return
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """What fails is reported by us; OpenCV would add lines about each of its ways to try."""
    before = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(before)
