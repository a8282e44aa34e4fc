"""What predict.py does, with a model that knows the answer."""

import json
import os
import re
import signal
import threading
import time
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pem_lightning.files import rgb_to_id
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.segment_files import segment_files
from pem_lightning.inference.sources import VideoReader
from pem_lightning.types import ClassInfo, DatasetInfo, Predictions, UserError

INFO = DatasetInfo("toy", (ClassInfo("car", (0, 0, 142), True, 26), ClassInfo("sky", (70, 130, 180), False, 23)))


class Cars(nn.Module):
    """Sees one car in the left third, one in the middle, and sky at the right; each frame a little later."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        height, width = (-(-side // 32) * 8 for side in images.shape[-2:])
        masks = torch.full((3, height, width), -9.0)
        for i in range(3):
            masks[i, :, i * width // 3 : (i + 1) * width // 3] = 9
        class_logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0]])
        return Predictions(class_logits.expand(len(images), -1, -1), masks.expand(len(images), -1, -1, -1))


def predictor(task="panoptic", seconds=0.0, **options):
    inference = TaskInference(task, INFO.thing_classes)
    return Predictor.from_parts(Cars(seconds), INFO, inference, device="cpu", **options)


def write_video(path, count=8, fps=12.0, codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), fps, (96, 64))
    for i in range(count):
        writer.write(np.full((64, 96, 3), 100 + 10 * i % 150, np.uint8))
    writer.release()
    return path


def write_image(path, value=100):
    Image.fromarray(np.full((64, 96, 3), value, np.uint8)).save(path)
    return path


def read(path):
    with VideoReader(path) as reader:
        return reader.fps, list(reader.frames())


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


class TestImages:
    @pytest.fixture
    def folder(self, tmp_path):
        (tmp_path / "in").mkdir()
        for name in ("a.png", "b.jpg"):
            write_image(tmp_path / "in" / name)
        return tmp_path / "in"

    @pytest.mark.parametrize(
        ("task", "save", "files"),
        [
            ("panoptic", None, ["{}_overlay.png", "panoptic/{}.png"]),
            ("panoptic", "masks", ["panoptic/{}.png"]),
            ("panoptic", "overlays", ["{}_overlay.png"]),
            ("semantic", "all", ["{}_overlay.png", "{}_semantic.png"]),
            ("semantic", "masks", ["{}_semantic.png"]),
            ("instance", "masks", ["{}_instances.json"]),
        ],
    )
    def test_what_is_saved(self, folder, tmp_path, task, save, files, capsys):
        segment_files(predictor(task), folder, tmp_path / "out", save=save)
        expected = [file.format(name) for name in "ab" for file in files]
        if task == "panoptic" and save != "overlays":
            expected.append("panoptic.json")
        assert names(tmp_path / "out") == sorted(expected)
        assert "2 of 2 images segmented" in capsys.readouterr().out

    def test_classes_restrict_all_files(self, folder, tmp_path):
        segment_files(predictor(classes=["sky"]), folder / "a.png", tmp_path / "out")
        annotation = json.loads((tmp_path / "out" / "panoptic.json").read_text())["annotations"][0]
        assert [s["category_id"] for s in annotation["segments_info"]] == [23]
        ids = rgb_to_id(np.asarray(Image.open(tmp_path / "out" / "panoptic" / "a.png")))
        assert set(np.unique(ids)) == {0, annotation["segments_info"][0]["id"]}
        overlay = np.asarray(Image.open(tmp_path / "out" / "a_overlay.png"))
        assert (overlay[:, :50] == 100).all()
        assert (overlay[:, 70:80] != 100).any()

    def test_batches_and_sizes_mix(self, folder, tmp_path):
        Image.new("L", (33, 32)).save(folder / "c.png")
        segment_files(predictor(batch_size=4), folder, tmp_path / "out")
        assert Image.open(tmp_path / "out" / "c_overlay.png").size == (33, 32)

    def test_broken_files_are_named_and_the_others_done(self, folder, tmp_path, capsys):
        (folder / "b.jpg").write_bytes(b"junk")
        (folder / "broken.mp4").write_bytes(b"junk")
        with pytest.raises(UserError, match="2 of 3 files could not be read"):
            segment_files(predictor(), folder, tmp_path / "out")
        assert "1 of 2 images segmented" in (printed := capsys.readouterr()).out
        assert printed.err.count("skipped: ") == 2
        assert "a_overlay.png" in names(tmp_path / "out")


class TestVideo:
    def test_is_as_large_and_as_fast(self, tmp_path, capsys):
        segment_files(predictor(), write_video(tmp_path / "clip.avi", codec="MJPG"), tmp_path / "out")
        assert names(tmp_path / "out") == ["clip.mp4"]
        fps, frames = read(tmp_path / "out" / "clip.mp4")
        assert (fps, len(frames), frames[0].shape) == (12, 8, (64, 96, 3))
        assert "clip done: 8 frames in" in (out := capsys.readouterr().out)
        assert "frames per second" in out

    def test_colours_stay_with_the_class(self, tmp_path):
        segment_files(predictor(), write_video(tmp_path / "clip.mp4", count=2), tmp_path / "out")
        frame = read(tmp_path / "out" / "clip.mp4")[1][0].astype(int)
        left, right = frame[4:12, 4:28].mean((0, 1)), frame[4:12, 38:60].mean((0, 1))
        assert np.abs(left - right).max() < 6
        assert frame[4:12, 30:34].max() > left.max() + 30  # a line tells the two cars apart

    @pytest.mark.parametrize(("every", "max_frames", "count"), [(1, 3, 3), (3, None, 3), (2, 2, 2), (100, None, 1)])
    def test_frames_can_be_left_out(self, tmp_path, every, max_frames, count):
        video = write_video(tmp_path / "clip.mp4")
        segment_files(predictor(), video, tmp_path / "out", save="all", every=every, max_frames=max_frames)
        fps, frames = read(tmp_path / "out" / "clip.mp4")
        assert len(frames) == count
        assert fps == pytest.approx(12 / every, abs=0.01)
        masks = [f"clip_masks/panoptic/clip_{i * every:06d}.png" for i in range(count)]
        assert names(tmp_path / "out") == sorted(["clip.mp4", "clip_masks/panoptic.json", *masks])

    def test_the_speed_is_shown(self, tmp_path):
        video = write_video(tmp_path / "clip.mp4", count=2)
        for show in (False, True):
            segment_files(predictor(classes=[]), video, tmp_path / "out", show_fps=show)
            corner = read(tmp_path / "out" / "clip.mp4")[1][0][:12, :5]
            assert (corner.max() < 80) == show

    def test_masks_alone(self, tmp_path):
        segment_files(predictor("semantic"), write_video(tmp_path / "a.mp4", 2), tmp_path / "out", save="masks")
        assert names(tmp_path / "out") == [f"a_masks/a_{i:06d}_semantic.png" for i in range(2)]

    def test_a_damaged_one_ends_whole_and_is_named(self, tmp_path, capsys):
        video = write_video(tmp_path / "clip.avi", count=40, codec="MJPG")
        video.write_bytes(video.read_bytes()[: video.stat().st_size * 2 // 3])
        segment_files(predictor(), video, tmp_path / "out")
        frames = read(tmp_path / "out" / "clip.mp4")[1]
        assert 0 < len(frames) < 40
        assert f"clip.avi is damaged: {40 - len(frames)} frames could not be read" in capsys.readouterr().err

    def test_among_images(self, tmp_path):
        (tmp_path / "in").mkdir()
        write_image(tmp_path / "in" / "a.png")
        write_video(tmp_path / "in" / "a.mp4", count=2)
        segment_files(predictor(), tmp_path / "in", tmp_path / "out")
        assert {"a.mp4", "a_overlay.png", "panoptic.json"} <= set(names(tmp_path / "out"))


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
        with camera(count=30, fps=200.0) as address:
            segment_files(predictor(), address, tmp_path)
        (video,) = tmp_path.glob("127_0_0_1_*_live.mp4")
        assert len(read(video)[1]) >= 20

    def test_ctrl_c_finishes_the_video_and_the_masks(self, tmp_path, capsys):
        def interrupt():
            while not list(tmp_path.glob(".*.mp4")):  # what is being written
                time.sleep(0.05)
            time.sleep(1.5)
            os.kill(os.getpid(), signal.SIGINT)

        with camera() as address:
            threading.Thread(target=interrupt, daemon=True).start()
            segment_files(predictor(seconds=0.2), address, tmp_path, save="all")
        out = capsys.readouterr().out
        assert "stopped by Ctrl-C after" in out
        (video,) = tmp_path.glob("*_live.mp4")
        fps, frames = read(video)
        (content,) = tmp_path.glob("*_masks/panoptic.json")
        count = len(json.loads(content.read_text())["annotations"])
        assert count >= 1
        assert len(frames) >= 2 * count  # five frames a second are shown so long that the video keeps time
        seconds = float(re.search(rf"after {count} frames in ([0-9.]+) s", out)[1])
        assert len(frames) / fps == pytest.approx(seconds, abs=0.5)

    def test_ctrl_c_before_the_first_frame(self, tmp_path, monkeypatch, capsys):
        class Impatient(VideoReader):
            def frames(self, every=1):
                signal.raise_signal(signal.SIGINT)
                time.sleep(0.1)
                yield from super().frames(every)

        monkeypatch.setattr("pem_lightning.inference.segment_files.VideoReader", Impatient)
        monkeypatch.setattr("pem_lightning.inference.segment_files.prefetch", lambda items: nullcontext(iter(items)))
        segment_files(predictor(), write_video(tmp_path / "clip.mp4"), tmp_path / "out")
        assert "clip stopped by Ctrl-C after 0 frames" in capsys.readouterr().out
        assert not (tmp_path / "out").exists()


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
        segment_files(predictor(), source, **{"output": "out", **options})
    assert "\n" not in str(error.value)
    assert (tmp_path / "clip.mp4").read_bytes() == content
    assert not (tmp_path / "out").exists()
