"""Finding and reading what people hand in: images of any format and mode, and the names of videos."""

from __future__ import annotations

import glob
import math
import os
import queue
import re
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from pem_lightning.data import dataset as reading
from pem_lightning.types import UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})
FORMATS = (*reading.FORMATS, "GIF", "JPEG2000")
"""Files are recognised by content. Of several frames or pages the first one counts."""

ImageLike = str | Path | Image.Image | np.ndarray | Tensor


def find_images(source: str | Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> list[Path]:
    """Images by name: one file, a folder's (not its subfolders'), or those that match a pattern.

    Args:
        source: a path, or a pattern with `*`, `?`, `[...]` or `**`. A single file is taken as it is.
        suffixes: the endings of files that are taken in folders and patterns.

    Returns:
        Sorted paths, at least one.

    Raises:
        UserError: there is no such file or folder, or no image in it.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        candidates, where = list(path.iterdir()), f"folder {path}"
    elif glob.has_magic(str(path)):
        candidates, where = [Path(match) for match in glob.glob(str(path), recursive=True)], f"pattern {path}"
    else:
        raise UserError(f"{path} does not exist: give an image, a folder of images or a pattern such as 'folder/*.png'")
    found = sorted(p for p in candidates if p.suffix.lower() in suffixes and p.is_file())
    if not found:
        raise UserError(f"no images in {where}: expected files that end in {', '.join(sorted(suffixes))}")
    return found


def read_image(source: ImageLike) -> UInt8[np.ndarray, "height width 3"]:
    """An image as RGB, upright as its EXIF orientation says.

    16-bit values are scaled to 8 bits; transparent parts are laid on white; of an animation the first frame is taken.

    Args:
        source: a file; a Pillow image; an array uint8 [H, W, 3] (RGB, returned as it is), [H, W, 4] (RGBA) or [H, W]
            (grey); or a tensor uint8 [3, H, W].

    Raises:
        UserError: the file is missing or is not a complete image, or the array or tensor has another shape or type.
    """
    if isinstance(source, Tensor):
        return _from_tensor(source)
    if isinstance(source, np.ndarray):
        return _from_array(source)
    # Pillow warns about images half as large as those it refuses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if isinstance(source, Image.Image):
            try:
                return reading.to_rgb(source)
            except (OSError, SyntaxError, ValueError) as error:  # it was opened, but not read yet
                raise UserError(f"cannot read the image ({error}): check that it is a complete image") from error
        return _from_file(Path(source))


def _from_file(path: Path) -> UInt8[np.ndarray, "height width 3"]:
    try:
        return reading.read_rgb(path, "check that it is a complete image file", FORMATS)
    except UserError as error:
        if not isinstance(error.__cause__, Image.DecompressionBombError):
            raise
        limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)
        raise UserError(f"{path} has more than {limit} million pixels: shrink it or cut it into parts") from error


def _from_array(array: np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise UserError(
            "an image must be a uint8 array [H, W, 3], [H, W, 4] or [H, W] (several images: a list of arrays), "
            f"not {array.dtype} {list(array.shape)}"
        )
    if channels == 3:
        return array
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    return reading.to_rgb(Image.fromarray(array))


def _from_tensor(tensor: Tensor) -> UInt8[np.ndarray, "height width 3"]:
    if tensor.dtype != torch.uint8 or tensor.ndim != 3 or len(tensor) != 3 or tensor.numel() == 0:
        raise UserError(
            "an image must be a uint8 tensor [3, H, W] (several images: a list of tensors), "
            f"not {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )
    return np.ascontiguousarray(tensor.permute(1, 2, 0).cpu().numpy())


# FFmpeg would print every fault itself; they are reported by us, once. Read when the first video is opened.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


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


T = TypeVar("T")


@contextmanager
def prefetch(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Lets a thread take items from an iterable, a few ahead of who uses them.

    Args:
        items: are taken in order, by one thread. What it raises is raised where the items are used.
        depth: at most so many wait to be used.

    Yields:
        The items. Outside of the `with` the thread runs no longer, so that what `items` reads from may be closed.
    """
    waiting: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    abandoned = threading.Event()

    def put(entry: tuple[T] | BaseException | None) -> None:
        while not abandoned.is_set():
            try:
                return waiting.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item,))
                if abandoned.is_set():
                    return
            put(None)
        except BaseException as error:  # belongs to the other thread, whatever it is
            put(error)

    def taken() -> Generator[T]:
        while (entry := waiting.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry[0]

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        abandoned.set()
        thread.join()
