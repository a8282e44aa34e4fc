"""The work of predict.py, with a network that knows the answer."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from PIL import Image

from pem_lightning.inference import segment_files as module
from pem_lightning.inference.segment_files import check_names, segment_files, stop_on_interrupt
from pem_lightning.inference.sources import VideoReader
from pem_lightning.types import UserError
from tests.inference.toy import Stripes, predictor


def cars(task="panoptic", seconds=0.0, **options):
    """Sees two cars, and sky at the right."""
    return predictor(task, Stripes((0, 0, 1), seconds), **options)


def write_video(path, count=8, codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 12.0, (96, 64))
    for i in range(count):
        writer.write(np.full((64, 96, 3), 100 + 10 * i % 150, np.uint8))
    writer.release()
    return path


def write_image(path):
    Image.fromarray(np.full((64, 96, 3), 100, np.uint8)).save(path)
    return path


def read(path):
    reader = VideoReader(path)
    return reader.fps, list(reader.frames())


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.jpg"):
        write_image(tmp_path / "in" / name)
    return tmp_path / "in"


class TestImages:
    @pytest.mark.parametrize(
        ("task", "save", "files"),
        [
            ("panoptic", None, ["{}_overlay.png", "panoptic/{}.png"]),
            ("panoptic", "overlays", ["{}_overlay.png"]),
            ("semantic", "all", ["{}_overlay.png", "{}_semantic.png"]),
            ("instance", "masks", ["{}_instances.json"]),
        ],
    )
    def test_what_is_saved(self, folder, tmp_path, task, save, files, capsys):
        segment_files(cars(task), folder, tmp_path / "out", save=save)
        expected = [file.format(name) for name in "ab" for file in files]
        if task == "panoptic" and save != "overlays":
            expected.append("panoptic.json")
        assert names(tmp_path / "out") == sorted(expected)
        assert "2 of 2 images segmented" in capsys.readouterr().out

    def test_batches_sizes_and_videos_mix(self, folder, tmp_path):
        Image.new("L", (33, 32)).save(folder / "c.png")
        write_video(folder / "a.mp4", count=2)
        segment_files(cars(batch_size=4), folder, tmp_path / "out")
        assert Image.open(tmp_path / "out" / "c_overlay.png").size == (33, 32)
        assert {"a.mp4", "a_overlay.png", "panoptic.json"} <= set(names(tmp_path / "out"))

    def test_broken_files_are_named_and_the_others_done(self, folder, tmp_path, capsys):
        (folder / "b.jpg").write_bytes(b"junk")
        (folder / "broken.mp4").write_bytes(b"junk")
        with pytest.raises(UserError, match="2 of 3 files could not be read"):
            segment_files(cars(), folder, tmp_path / "out")
        assert "1 of 2 images segmented" in (printed := capsys.readouterr()).out
        assert printed.err.count("skipped: ") == 2
        assert "a_overlay.png" in names(tmp_path / "out")


class TestVideo:
    def test_is_as_large_and_as_fast(self, tmp_path, capsys):
        segment_files(cars(), write_video(tmp_path / "clip.avi", codec="MJPG"), tmp_path / "out")
        assert names(tmp_path / "out") == ["clip.mp4"]
        fps, frames = read(tmp_path / "out" / "clip.mp4")
        assert (fps, len(frames), frames[0].shape) == (12, 8, (64, 96, 3))
        assert "clip done: 8 frames in" in (out := capsys.readouterr().out)
        assert "frames per second" in out
        # Colours stay with the class, and a line tells the two cars apart.
        frame = frames[0].astype(int)
        left, right = frame[4:12, 4:28].mean((0, 1)), frame[4:12, 38:60].mean((0, 1))
        assert np.abs(left - right).max() < 6
        assert frame[4:12, 30:34].max() > left.max() + 30

    @pytest.mark.parametrize(("every", "max_frames", "count"), [(1, 3, 3), (3, None, 3), (2, 2, 2), (100, None, 1)])
    def test_frames_can_be_left_out(self, tmp_path, every, max_frames, count):
        video = write_video(tmp_path / "clip.mp4")
        segment_files(cars(), video, tmp_path / "out", save="all", every=every, max_frames=max_frames)
        fps, frames = read(tmp_path / "out" / "clip.mp4")
        assert len(frames) == count
        assert fps == pytest.approx(12 / every, abs=0.01)
        masks = [f"clip_masks/panoptic/clip_{i * every:06d}.png" for i in range(count)]
        assert names(tmp_path / "out") == sorted(["clip.mp4", "clip_masks/panoptic.json", *masks])

    def test_the_speed_is_shown(self, tmp_path):
        video = write_video(tmp_path / "clip.mp4", count=2)
        for show in (False, True):
            segment_files(cars(classes=[]), video, tmp_path / "out", show_fps=show)
            corner = read(tmp_path / "out" / "clip.mp4")[1][0][:12, :5]
            assert (corner.max() < 80) == show

    def test_masks_alone(self, tmp_path):
        segment_files(cars("semantic"), write_video(tmp_path / "a.mp4", 2), tmp_path / "out", save="masks")
        assert names(tmp_path / "out") == [f"a_masks/a_{i:06d}_semantic.png" for i in range(2)]

    def test_a_cut_one_ends_whole_and_is_counted(self, tmp_path, capsys):
        video = write_video(tmp_path / "clip.avi", count=40, codec="MJPG")
        video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
        segment_files(cars(), video, tmp_path / "out")
        frames = read(tmp_path / "out" / "clip.mp4")[1]
        assert 0 < len(frames) < 40
        assert f"clip done: {len(frames)} of 40 frames in" in capsys.readouterr().out


@contextmanager
def camera(fps=20.0, count=10**6):
    """A stream of MJPEG over HTTP, as cameras send it; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for i in range(count):
                jpeg = cv2.imencode(".jpg", np.full((64, 96, 3), i % 256, np.uint8))[1].tobytes()
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                try:
                    self.wfile.write(head.encode() + jpeg + b"\r\n")
                except OSError:  # nobody is watching any more
                    return
                time.sleep(1 / fps)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/live"
    finally:
        server.shutdown()


class TestStream:
    def test_runs_until_it_ends(self, tmp_path):
        with camera(count=30, fps=20.0) as address:
            segment_files(cars(), address, tmp_path)
        (video,) = tmp_path.glob("127_0_0_1_*_live.mp4")
        assert len(read(video)[1]) >= 5  # some are dropped where the machine is slow

    def test_a_slow_network_sees_the_newest_frames(self, tmp_path, capsys):
        with camera(fps=30.0) as address:
            segment_files(cars(classes=[], seconds=0.3), address, tmp_path, max_frames=6, show_fps=True)
        (video,) = tmp_path.glob("*_live.mp4")
        shown = [frame[40:, 80:].mean() for frame in read(video)[1]]
        assert len(shown) == 6
        assert shown[-1] - shown[0] > 15  # nine frames come while one is segmented; without dropping any it is 5
        assert "dropped to stay with the source, results in" in capsys.readouterr().out

    def test_a_slow_network_sees_all_frames_of_a_file(self, tmp_path, capsys):
        segment_files(cars(seconds=0.05), write_video(tmp_path / "clip.mp4", count=12), tmp_path / "out")
        assert len(read(tmp_path / "out" / "clip.mp4")[1]) == 12
        assert "dropped" not in capsys.readouterr().out

    def test_ctrl_c_finishes_the_video_and_the_masks(self, tmp_path, capsys):
        def interrupt():
            while not list(tmp_path.glob(".*.mp4")):  # what is being written
                time.sleep(0.05)
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)

        with camera() as address:
            threading.Thread(target=interrupt, daemon=True).start()
            segment_files(cars(seconds=0.05), address, tmp_path, save="all")
        (video,) = tmp_path.glob("*_live.mp4")
        (content,) = tmp_path.glob("*_masks/panoptic.json")
        count = len(json.loads(content.read_text())["annotations"])
        assert len(read(video)[1]) == count >= 1
        assert f"stopped by Ctrl-C after {count} frames in" in capsys.readouterr().out

    def test_ctrl_c_before_the_first_frame(self, tmp_path, monkeypatch, capsys):
        class Impatient(VideoReader):
            def frames(self, every=1):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.1)
                yield from super().frames(every)

        monkeypatch.setattr(module, "VideoReader", Impatient)
        monkeypatch.setattr(module, "prefetch", lambda items, depth: nullcontext(iter(items)))
        segment_files(cars(), write_video(tmp_path / "clip.mp4"), tmp_path / "out")
        assert "clip stopped by Ctrl-C after 0 frames" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()


class TestInterrupt:
    @pytest.fixture(autouse=True)
    def _as_in_a_terminal(self):
        """A shell starts what runs in the background with Ctrl-C ignored."""
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
        signal.signal(signal.SIGINT, before)

    def test_the_first_one_is_an_event_and_the_second_one_interrupts(self):
        before = signal.getsignal(signal.SIGINT)
        with stop_on_interrupt() as stopped:
            assert not stopped.is_set()
            os.kill(os.getpid(), signal.SIGINT)
            assert stopped.wait(5)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before

    def test_in_a_thread_nothing_changes(self):
        def handler():
            with stop_on_interrupt():
                return signal.getsignal(signal.SIGINT)

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(handler).result() is signal.getsignal(signal.SIGINT)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("gone.mp4", {}, "gone.mp4 does not exist"),
        ("junk.mp4", {}, "cannot open video"),
        (97, {}, "no camera 97"),
        ("clip.mp4", {"save": "mask"}, r"no save=mask \(did you mean masks\?\); choose one of: all, masks, overlays"),
        ("clip.mp4", {"every": 0}, "every=0"),
        ("clip.mp4", {"max_frames": 0}, "max_frames=0"),
        ("clip.mp4", {"output": "."}, "overwrite clip.mp4 itself"),
        ("panoptic", {"output": "."}, r"overwrite panoptic/x\.png itself"),
        ("twice", {}, "2 files named x"),
    ],
)
def test_mistakes_are_said_in_one_line_and_nothing_is_lost(tmp_path, monkeypatch, source, options, message):
    monkeypatch.chdir(tmp_path)
    content = write_video(tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "junk.mp4").write_bytes(b"junk")
    for folder, file in (("panoptic", "x.png"), ("twice", "x.png"), ("twice", "x.jpg")):
        (tmp_path / folder).mkdir(exist_ok=True)
        write_image(tmp_path / folder / file)
    with pytest.raises(UserError, match=message) as error:
        segment_files(cars(), source, **{"output": "out", **options})
    assert "\n" not in str(error.value)
    assert (tmp_path / "clip.mp4").read_bytes() == content
    assert not (tmp_path / "out").exists()


def test_a_disk_that_does_not_tell_cases_apart(tmp_path, monkeypatch):
    """As a Mac's: X.MP4 is x.mp4 there, here two names of one file."""
    video = write_video(tmp_path / "x.mp4").rename(tmp_path / "x.MP4")
    (tmp_path / "x.mp4").hardlink_to(video)
    with pytest.raises(UserError, match=r"would overwrite .*x\.MP4 itself"):
        segment_files(cars(), video, output=tmp_path)
    (tmp_path / "in").mkdir()
    for name in ("Photo.png", "photo.jpg"):
        write_image(tmp_path / "in" / name)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="2 files named photo, whose results would overwrite one another"):
        check_names([*(tmp_path / "in").iterdir()], [], tmp_path / "out", "in")
