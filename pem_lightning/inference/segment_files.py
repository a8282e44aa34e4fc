"""The work of predict.py, without Hydra: images, videos and streams in, result files out."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

from rich.progress import track

from pem_lightning.files import same_on_disk
from pem_lightning.inference.exchange import ExchangeFiles
from pem_lightning.inference.predictor import Photo, Predictor, read_photo
from pem_lightning.inference.results import SegmentedImage, write_results
from pem_lightning.inference.sources import (
    VideoReader,
    VideoWriter,
    find_sources,
    is_stream,
    prefetch,
)
from pem_lightning.inference.visualize import draw_caption
from pem_lightning.types import UserError, did_you_mean

SAVE = ("all", "masks", "overlays")


def segment_files(
    predictor: Predictor,
    source: str | Path | int | list[str | Path | int],
    output: str | Path,
    *,
    save: str | None = None,
    every: int = 1,
    max_frames: int | None = None,
    show_fps: bool = False,
    formats: str | Sequence[str] | None = None,
) -> None:
    """Segment images, videos or a stream.

    An image gives `<name>_overlay.png`, and masks as `write_coco_panoptic` or `SegmentedImage.save` write them. A video
    gives `<name>.mp4` of overlays at its size and speed, and masks of every frame in the folder `<name>_masks`.

    Args:
        predictor: decides on the task.
        source: an image or a video, a folder of them, a pattern, a camera's number or a stream's address; or a list.
        output: folder for the results.
        save: "masks", "overlays" or "all"; by default all of images, and overlays of videos.
        every: segment only every n-th frame of a video; the result has the same duration.
        max_frames: stop a video after so many results.
        show_fps: write onto a video how many frames per second are segmented.
        formats: of images for other tools, besides the results: see `ExchangeFiles`.

    Raises:
        UserError: there is nothing to segment, two results would have the same name, an option is impossible, or some
            files could not be read. These are named and skipped, and raise when all others are done.
    """
    check_options(save, every=every, max_frames=max_frames)
    output = Path(output)
    exchange = ExchangeFiles(output, [formats] if isinstance(formats, str) else list(formats or ()))
    files, videos = find_sources(source)
    check_names(files, videos, output, source)
    if videos and exchange.formats:
        raise UserError(f"formats= is for images, and {videos[0]} is a video: leave it out, or give single frames")
    failed: list[str] = []
    if files:
        _segment_images(predictor, files, output, save or "all", exchange, failed)
    for video in videos:
        try:
            _segment_video(predictor, video, output, save or "overlays", every, max_frames, show_fps)
        except UserError as error:
            if len(videos) + len(files) == 1:
                raise
            _skip(video, error, failed)
    if failed:
        count = len(files) + len(videos)
        raise UserError(f"{len(failed)} of {count} files could not be read: repair or remove those named above")


def check_options(save: str | None, **numbers: int | None) -> None:
    """Raise a UserError if there is no such choice of what to save, or a number is below 1."""
    if save is not None and save not in SAVE:
        raise UserError(f"there is no save={save}{did_you_mean(str(save), SAVE)}; choose one of: {', '.join(SAVE)}")
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise UserError(f"{name}={number}: choose 1 or more")


def check_names(files: Sequence[Path], videos: Sequence[str], output: Path, source: object) -> None:
    """No result may overwrite another one, or the input."""
    for names in ([path.stem for path in files], [_video_name(video) for video in videos]):
        name, times = Counter(map(same_on_disk, names)).most_common(1)[0] if names else ("", 0)
        if times > 1:
            raise UserError(
                f"input={source} has {times} files named {name}, whose results would overwrite one another: rename them"
            )
    targets = {video: output / f"{_video_name(video)}.mp4" for video in videos}
    # Not by comparing names: on a Mac's disk X.MP4 is x.mp4.
    overwritten = [v for v, t in targets.items() if t.exists() and Path(v).exists() and t.samefile(v)]
    overwritten += [str(path) for path in files if path.resolve().parent == (output / "panoptic").resolve()]
    if overwritten:
        raise UserError(f"the result would overwrite {overwritten[0]} itself: choose another output folder")


def _video_name(video: str) -> str:
    """A file's name without suffix; for a stream a name made from its address."""
    if not is_stream(video):
        return Path(video).stem
    if video.isdecimal():
        return f"camera_{video}"
    address = re.sub(r"//[^/@]*@", "//", video).split("?")[0].split("://", 1)[1]  # no passwords in file names
    return re.sub(r"[^A-Za-z0-9]+", "_", address).strip("_") or "stream"


def _skip(path: str | Path, error: UserError, failed: list[str]) -> None:
    failed.append(str(path))
    print(f"skipped: {error}", file=sys.stderr)


def _segment_images(
    predictor: Predictor,
    files: Sequence[Path],
    output: Path,
    save: str,
    exchange: ExchangeFiles,
    failed: list[str],
) -> None:
    def photos() -> Iterator[Photo]:
        for path in track(files, f"Segmenting {len(files)} images", disable=len(files) == 1):
            try:
                yield read_photo(path)
            except UserError as error:
                _skip(path, error, failed)

    results = exchange.passing(predictor.stream(photos()))
    _write(results, predictor, output, masks=save != "overlays", overlays=save != "masks")
    print(f"{len(files) - len(failed)} of {len(files)} images segmented, results in {output}")


def _write(
    results: Iterable[SegmentedImage], predictor: Predictor, output: Path, *, masks: bool, overlays: bool
) -> None:
    write_results(results, predictor.inference.task, predictor.info, output, masks=masks, overlays=overlays)


def _segment_video(
    predictor: Predictor, video: str, output: Path, save: str, every: int, max_frames: int | None, show_fps: bool
) -> None:
    name = _video_name(video)
    target, masks = output / f"{name}.mp4", output / f"{name}_masks"
    reader = VideoReader(video)
    count = 0
    with stop_on_interrupt() as stopped, VideoWriter(target, reader.fps / every) as writer:
        expected = None if reader.num_frames is None else -(-reader.num_frames // every)
        if max_frames is not None:
            expected = max_frames if expected is None else min(expected, max_frames)
        start = time.perf_counter()
        times = deque([start], maxlen=16)  # of the last results

        def photos() -> Iterator[Photo]:
            for i, frame in enumerate(islice(reader.frames(every), max_frames)):
                if stopped.is_set():
                    return
                yield Photo(f"{name}_{i * every:06d}", frame)

        def drawn(results: Iterable[SegmentedImage]) -> Iterator[SegmentedImage]:
            """The results, each also written into the video."""
            nonlocal count
            for result in track(results, f"Segmenting {name}", total=expected):
                if stopped.is_set():
                    return
                count += 1
                times.append(time.perf_counter())
                if save != "masks":
                    picture = result.overlay(shade_things=False)
                    if show_fps:
                        speed = f"{(len(times) - 1) / max(times[-1] - times[0], 1e-9):.1f} fps"
                        draw_caption(picture, f"{speed}, {reader.dropped} dropped" if reader.is_live else speed)
                    writer.write(picture)
                yield result

        # What waits gets old. A live source reads ahead by itself, and of its results only the next one is made.
        frames, depth = (nullcontext(photos()), 1) if reader.is_live else (prefetch(photos(), 3), 3)
        with frames as ahead, prefetch(predictor.stream(ahead), depth) as results:
            _write(drawn(results), predictor, masks, masks=save != "overlays", overlays=False)
    if count == 0 and not stopped.is_set():
        raise UserError(f"{video} has no frame that can be read: check that it is a complete video")
    ended = "stopped by Ctrl-C after" if stopped.is_set() else "done:"
    if count == 0:
        print(f"{name} {ended} 0 frames")
        return
    seconds = times[-1] - start
    shown = f"{count} of {expected}" if expected and count < expected and not stopped.is_set() else str(count)
    where = {"masks": str(masks), "overlays": str(target), "all": f"{target} and {masks}"}[save]
    dropped = f"{reader.dropped} dropped to stay with the source, " if reader.dropped else ""
    print(
        f"{name} {ended} {shown} frames in {seconds:.1f} s, {count / max(seconds, 1e-9):.1f} frames per second, "
        f"{dropped}results in {where}"
    )


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that files can be finished; a second one interrupts."""
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
