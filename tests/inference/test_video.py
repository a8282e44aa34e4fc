import os
import signal
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from pem_lightning.inference.sources import FrameRate, VideoReader, VideoWriter, is_stream, stop_on_interrupt
from pem_lightning.types import UserError


def frame(i, height=48, width=64):
    """A grey that tells the number, left of red."""
    picture = np.full((height, width, 3), 8 * i, np.uint8)
    picture[:, width // 2 :] = 200, 0, 0
    return picture


def write(path, count=12, fps=10, codec="mp4v", **size):
    height, width = frame(0, **size).shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    assert writer.isOpened()
    for i in range(count):
        writer.write(frame(i, **size)[..., ::-1])
    writer.release()
    return path


def numbers(frames):
    """What `frame` was called with."""
    return [round(picture[5:-5, 5:20].mean() / 8) for picture in frames]


@pytest.mark.parametrize(
    ("source", "expected"),
    [(0, True), ("1", True), ("rtsp://camera/1", True), ("http://host/x.mp4", True), ("x.mp4", False), ("./0", False)],
)
def test_what_is_a_stream(source, expected):
    assert is_stream(source) == expected


class TestReader:
    @pytest.mark.parametrize(("name", "codec"), [("x.mp4", "mp4v"), ("x.avi", "MJPG"), ("x.mkv", "mp4v")])
    def test_reads_all_frames_as_rgb(self, tmp_path, name, codec):
        with VideoReader(write(tmp_path / name, codec=codec)) as reader:
            assert (reader.fps, reader.num_frames, reader.is_live) == (10, 12, False)
            frames = list(reader.frames())
        assert numbers(frames) == list(range(12))
        assert frames[0].shape == (48, 64, 3)
        assert np.abs(frames[0][10, 50].astype(int) - [200, 0, 0]).max() < 30
        assert reader.damaged == 0

    @pytest.mark.parametrize("every", [2, 5, 12, 100])
    def test_leaves_frames_out(self, tmp_path, every):
        with VideoReader(write(tmp_path / "x.mp4")) as reader:
            assert numbers(reader.frames(every)) == list(range(0, 12, every))
        assert reader.damaged == 0

    def test_goes_on_after_damaged_frames(self, tmp_path):
        content = write(tmp_path / "x.mp4").read_bytes()
        frames_start_with = b"\x00\x00\x01\xb6"
        before, _, after = content.rpartition(frames_start_with)
        before, _, between = before.rpartition(frames_start_with)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(before + bytes(4) + between + frames_start_with + after)
        with VideoReader(path) as reader:
            assert numbers(reader.frames()) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11]
            assert reader.damaged == 1

    def test_a_cut_file_is_read_to_its_end_and_said_to_be_damaged(self, tmp_path):
        path = write(tmp_path / "x.avi", count=30, codec="MJPG")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with VideoReader(path) as reader:
            frames = list(reader.frames())
        assert numbers(frames) == list(range(len(frames)))
        assert 2 < len(frames) < 25
        assert reader.damaged == 30 - len(frames)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("gone.mp4", "does not exist"),
            ("junk.mp4", "cannot open video .* convert it to MP4"),
            ("empty.mp4", "cannot open video"),
            ("97", "there is no camera 97"),
            ("rtsp://127.0.0.1:9/x", "check the address"),
            ("http://127.0.0.1:9/x.mp4", "check the address"),
        ],
    )
    def test_what_cannot_be_opened_gets_one_line(self, tmp_path, monkeypatch, name, message, capfd):
        monkeypatch.chdir(tmp_path)
        Path("junk.mp4").write_bytes(b"junk" * 1000)
        Path("empty.mp4").touch()
        with pytest.raises(UserError, match=message) as error:
            VideoReader(name)
        assert "\n" not in str(error.value)
        assert capfd.readouterr() == ("", "")

    def test_an_address(self, tmp_path):
        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

        write(tmp_path / "x.mkv")
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with VideoReader(f"http://127.0.0.1:{server.server_port}/x.mkv") as reader:
                assert numbers(reader.frames()) == list(range(12))
        finally:
            server.shutdown()
            server.server_close()


def read(path):
    with VideoReader(path) as reader:
        return reader.fps, list(reader.frames())


class TestWriter:
    @pytest.mark.parametrize("fps", [10, 29.97, 0.5])
    def test_what_is_written_is_read_again(self, tmp_path, fps):
        path = tmp_path / "new" / "folder" / "x.mp4"
        with VideoWriter(path, fps) as writer:
            for i in range(6):
                writer.write(frame(i), times=2)
            assert writer.num_frames == 12
            assert not path.exists()
        found, frames = read(path)
        assert found == pytest.approx(fps, abs=0.01)
        assert numbers(frames) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
        assert np.abs(frames[0][10, 50].astype(int) - [200, 0, 0]).max() < 30
        assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]

    @pytest.mark.parametrize(("size", "even"), [((1, 1), (2, 2)), ((33, 64), (34, 64)), ((48, 65), (48, 66))])
    def test_odd_sides_get_one_pixel_more(self, tmp_path, size, even):
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(3, *size))
        assert read(tmp_path / "x.mp4")[1][0].shape == (*even, 3)

    def test_a_size_that_changes(self, tmp_path):
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(1))
            writer.write(frame(2, 96, 128))
        frames = read(tmp_path / "x.mp4")[1]
        assert numbers(frames) == [1, 2]
        assert frames[1].shape == (48, 64, 3)

    def test_an_error_leaves_a_whole_video(self, tmp_path):
        def fail():
            with VideoWriter(tmp_path / "x.mp4", 10) as writer:
                writer.write(frame(1))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fail()
        assert numbers(read(tmp_path / "x.mp4")[1]) == [1]

    def test_without_frames_there_is_no_file(self, tmp_path):
        with VideoWriter(tmp_path / "x.mp4", 10):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_what_cannot_be_written_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with (
            pytest.raises(UserError, match=r"cannot write .*x\.mp4"),
            VideoWriter(tmp_path / "file/x.mp4", 1) as writer,
        ):
            writer.write(frame(0))
        with pytest.raises(UserError, match=r"8192 x 16 .* larger"), VideoWriter(tmp_path / "x.mp4", 1) as writer:
            writer.write(np.zeros((16, 8192, 3), np.uint8))
        assert [p.name for p in tmp_path.iterdir()] == ["file"]

    def test_a_lost_file_is_noticed(self, tmp_path):
        def lose():
            with VideoWriter(tmp_path / "x.mp4", 10) as writer:
                writer.write(frame(0))
                next(tmp_path.iterdir()).unlink()

        with pytest.raises(UserError, match="make room"):
            lose()


class TestFrameRate:
    def test_counts(self, monkeypatch):
        now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: now)
        rate = FrameRate()
        for i in range(40):
            now += 1.0 if i < 20 else 0.125
            lately = rate.tick()
        assert rate.num_frames == 40
        assert rate.seconds == 22.5
        assert rate.overall == pytest.approx(40 / 22.5)
        assert lately == pytest.approx(8)
        assert rate.due(10) == 225


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
        before, inside = signal.getsignal(signal.SIGINT), []

        def run():
            with stop_on_interrupt() as stopped:
                inside.append((signal.getsignal(signal.SIGINT), stopped.is_set()))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert inside == [(before, False)]
