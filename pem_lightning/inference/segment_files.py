"""What predict.py does, without Hydra: images, videos and streams in, result files out."""

from __future__ import annotations

import difflib
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.progress import track

from pem_lightning.inference.predictor import Photo, Predictor, read_photo
from pem_lightning.inference.results import SegmentedImage, write_coco_panoptic
from pem_lightning.inference.sources import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    FrameRate,
    VideoReader,
    VideoWriter,
    find_images,
    is_stream,
    prefetch,
    stop_on_interrupt,
)
from pem_lightning.inference.visualize import draw_caption
from pem_lightning.types import UserError

SAVE = ("all", "masks", "overlays")


def segment_files(
    predictor: Predictor,
    source: str | Path | int,
    output: str | Path,
    *,
    save: str | None = None,
    every: int = 1,
    max_frames: int | None = None,
    show_fps: bool = False,
) -> None:
    """Segment images, videos or a stream, and write the results.

    Of an image: `<name>_overlay.png`, and masks as `write_coco_panoptic` or `SegmentedImage.save` write them. Of a
    video: `<name>.mp4` of overlays, at its size and speed, and masks of every frame in the folder `<name>_masks`.

    Args:
        predictor: decides on the task.
        source: an image or a video, a folder of them, a pattern, a camera's number or a stream's address.
        output: folder for the results.
        save: "masks", "overlays" or "all"; by default all of images, and overlays of videos.
        every: of a video only the first of so many frames is segmented; the result is as much slower, and as long.
        max_frames: stop a video after so many results.
        show_fps: write onto a video how many frames per second are segmented.

    Raises:
        UserError: there is nothing to segment, two results would have the same name, an option is impossible, or some
            files could not be read. These are named and skipped, and raise when all others are done.
    """
    _check(save, every, max_frames)
    output = Path(output)
    if is_stream(source):
        files, videos = [], [str(source)]
    else:
        paths = find_images(str(source), IMAGE_SUFFIXES | VIDEO_SUFFIXES)
        files = [path for path in paths if path.suffix.lower() not in VIDEO_SUFFIXES]
        videos = [str(path) for path in paths if path not in files]
    _check_names(files, videos, output, source)
    failed: list[str] = []
    if files:
        _segment_images(predictor, files, output, save or "all", failed)
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


def _check(save: str | None, every: int, max_frames: int | None) -> None:
    if save is not None and save not in SAVE:
        close = difflib.get_close_matches(str(save), SAVE, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"there is no save={save}{hint}; choose one of: {', '.join(SAVE)}")
    for name, number in (("every", every), ("max_frames", max_frames)):
        if number is not None and number < 1:
            raise UserError(f"{name}={number}: choose 1 or more")


def _check_names(files: Sequence[Path], videos: Sequence[str], output: Path, source: str | Path | int) -> None:
    """Nothing may overwrite another result, or what it is made from."""
    for names in ([path.stem for path in files], [_video_name(video) for video in videos]):
        name, times = Counter(names).most_common(1)[0] if names else ("", 0)
        if times > 1:
            raise UserError(
                f"input={source} has {times} files named {name}, whose results would overwrite one another: rename them"
            )
    for video in videos:
        if Path(video).resolve() == (output / f"{_video_name(video)}.mp4").resolve():
            raise UserError(f"the result would overwrite {video} itself: choose another output folder")
    for path in files:
        if path.resolve().parent == (output / "panoptic").resolve():
            raise UserError(f"the result would overwrite {path} itself: choose another output folder")


def _video_name(video: str) -> str:
    """A file's name without suffix; for a stream what of its address can be a file's name."""
    if not is_stream(video):
        return Path(video).stem
    if video.isdecimal():
        return f"camera_{video}"
    address = re.sub(r"//[^/@]*@", "//", video).split("?")[0].split("://", 1)[1]  # no passwords in file names
    return re.sub(r"[^A-Za-z0-9]+", "_", address).strip("_") or "stream"


def _skip(path: str | Path, error: UserError, failed: list[str]) -> None:
    failed.append(str(path))
    print(f"skipped: {error}", file=sys.stderr)


def _segment_images(predictor: Predictor, files: Sequence[Path], output: Path, save: str, failed: list[str]) -> None:
    def photos() -> Iterator[Photo]:
        """One after the other, so that only a batch is held."""
        for path in track(files, f"Segmenting {len(files)} images", disable=len(files) == 1):
            try:
                yield read_photo(path)
            except UserError as error:
                _skip(path, error, failed)

    _write(predictor.stream(photos()), predictor, output, masks=save != "overlays", overlays=save != "masks")
    print(f"{len(files) - len(failed)} of {len(files)} images segmented, results in {output}")


def _write(
    results: Iterable[SegmentedImage], predictor: Predictor, output: Path, *, masks: bool, overlays: bool
) -> None:
    if masks and predictor.inference.task == "panoptic":
        write_coco_panoptic(results, output, predictor.info, overlays=overlays)
        return
    for result in results:
        result.save(output, masks=masks, overlay=overlays)


def _segment_video(
    predictor: Predictor,
    video: str,
    output: Path,
    save: str,
    every: int,
    max_frames: int | None,
    show_fps: bool,
) -> None:
    name = _video_name(video)
    target, masks = output / f"{name}.mp4", output / f"{name}_masks"
    with (
        stop_on_interrupt() as stopped,
        VideoReader(video) as reader,
        VideoWriter(target, reader.fps / every) as writer,
    ):

        def photos() -> Iterator[Photo]:
            """Numbered by their place in the video."""
            for i, frame in enumerate(islice(reader.frames(every), max_frames)):
                if stopped.is_set():
                    return
                yield Photo(f"{name}_{i * every:06d}", frame)

        def drawn(results: Iterable[SegmentedImage]) -> Iterator[SegmentedImage]:
            """Counted, and written into the video on their way."""
            for result in track(results, f"Segmenting {name}", total=_count(reader, every, max_frames)):
                if stopped.is_set():
                    return
                speed = rate.tick()
                if save != "masks":
                    picture = result.overlay(shade_things=False)
                    if show_fps:
                        draw_caption(picture, f"{speed:.1f} fps")
                    # What is live and comes faster than it is segmented is shown longer, so that the video keeps time.
                    late = rate.due(writer.fps) - writer.num_frames if reader.is_live else 1
                    writer.write(picture, times=max(1, late))
                yield result

        rate = FrameRate()
        with prefetch(photos()) as ahead, prefetch(predictor.stream(ahead)) as results:
            if save == "overlays":
                deque(drawn(results), maxlen=0)
            else:
                _write(drawn(results), predictor, masks, masks=True, overlays=False)
    if rate.num_frames == 0 and not stopped.is_set():
        raise UserError(f"{video} has no frame that can be read: check that it is a complete video")
    if reader.damaged:
        print(f"{video} is damaged: {reader.damaged} frames could not be read, the rest is done", file=sys.stderr)
    ended = "stopped by Ctrl-C after" if stopped.is_set() else "done:"
    if rate.num_frames == 0:
        print(f"{name} {ended} 0 frames")
        return
    where = {"masks": str(masks), "overlays": str(target), "all": f"{target} and {masks}"}[save]
    print(
        f"{name} {ended} {rate.num_frames} frames in {rate.seconds:.1f} s, {rate.overall:.1f} frames per second, "
        f"results in {where}"
    )


def _count(reader: VideoReader, every: int, max_frames: int | None) -> int | None:
    """How many results there will be, as far as it is known."""
    counts = [] if reader.num_frames is None else [-(-reader.num_frames // every)]
    return min([*counts, *([] if max_frames is None else [max_frames])], default=None)
