"""Images of every kind, videos in and out, and reading ahead."""

import io
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.inference import sources
from pem_lightning.inference.sources import VideoReader, VideoWriter, find_images, is_stream, prefetch, read_image
from pem_lightning.types import UserError


class TestFindImages:
    @pytest.fixture
    def folder(self, tmp_path):
        for name in ("b.png", "._b.png", "a.JPG", "notes.txt", "x[1].tif", "sub/c.png"):  # ._b.png is macOS's own
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"")
        return tmp_path

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            ("notes.txt", ["notes.txt"]),
            (".", ["a.JPG", "b.png", "x[1].tif"]),
            ("**/*.png", ["b.png", "sub/c.png"]),
            ("x[1].tif", ["x[1].tif"]),
        ],
    )
    def test_files_folders_and_patterns(self, folder, source, expected):
        assert find_images(f"{folder}/{source}") == [folder / name for name in expected]

    @pytest.mark.parametrize(
        ("source", "message"),
        [("nowhere", "does not exist"), ("*.gif", "no images in pattern"), ("empty", "no images in folder")],
    )
    def test_nothing_found_is_said_in_one_line(self, folder, source, message):
        (folder / "empty").mkdir()
        with pytest.raises(UserError, match=message) as error:
            find_images(folder / source)
        assert "\n" not in str(error.value)


class TestReadImage:
    def save(self, path, image, **options):
        image.save(path, **options)
        return read_image(path)

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        suffix = "tif" if mode == "CMYK" else "png"
        read = self.save(tmp_path / f"x.{suffix}", Image.new("RGB", (5, 4), "white").convert(mode))
        assert (read.dtype, read.shape, read.min()) == (np.uint8, (4, 5, 3), 255)

    def test_sixteen_bit_grey_is_scaled(self, tmp_path):
        values = np.array([[0, 257 * 100, 65535]], np.uint16)
        assert self.save(tmp_path / "x.png", Image.fromarray(values))[0, :, 0].tolist() == [0, 100, 255]

    @pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
    def test_sixteen_bit_colours_are_scaled(self, tmp_path, suffix):
        values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
        cv2.imwrite(str(tmp_path / f"x.{suffix}"), values[..., ::-1])
        assert np.abs(read_image(tmp_path / f"x.{suffix}") - values / 257).max() < 1

    def test_values_of_no_known_range_are_refused(self, tmp_path):
        with pytest.raises(UserError, match="floating-point"):
            self.save(tmp_path / "x.tif", Image.fromarray(np.full((2, 2), 0.5, np.float32)))

    def test_transparent_pixels_are_white(self, tmp_path):
        pixels = np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8)
        assert self.save(tmp_path / "x.png", Image.fromarray(pixels)).tolist() == [[[255] * 3, [10, 20, 30]]]
        palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
        palette.putpalette([10, 20, 30, 40, 50, 60])
        assert self.save(tmp_path / "p.png", palette, transparency=0).tolist() == [[[255] * 3, [40, 50, 60]]]

    @pytest.mark.parametrize(
        ("orientation", "stored"),
        [
            (1, lambda upright: upright),
            (2, lambda upright: upright[:, ::-1]),
            (3, lambda upright: upright[::-1, ::-1]),
            (4, lambda upright: upright[::-1]),
            (5, lambda upright: upright.transpose(1, 0, 2)),
            (6, lambda upright: np.rot90(upright, 1)),
            (7, lambda upright: upright[::-1, ::-1].transpose(1, 0, 2)),
            (8, lambda upright: np.rot90(upright, -1)),
        ],
    )
    def test_every_exif_orientation_becomes_upright(self, tmp_path, orientation, stored):
        upright = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(stored(upright)))
        assert (self.save(tmp_path / "x.png", image, exif=exif) == upright).all()
        with Image.open(tmp_path / "x.png") as opened:
            assert (read_image(opened) == upright).all()

    def test_the_first_frame_of_an_animation_is_taken(self, tmp_path):
        frames = [Image.new("RGB", (3, 2), color) for color in ("red", "blue")]
        read = self.save(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
        assert read.tolist() == np.full((2, 3, 3), (255, 0, 0)).tolist()
        assert find_images(tmp_path) == [tmp_path / "x.gif"]

    def test_a_decompression_bomb_gets_one_line(self, tmp_path, monkeypatch, recwarn):
        Image.new("L", (30, 30)).save(tmp_path / "bomb.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30 - 1)
        assert read_image(tmp_path / "bomb.png").shape == (30, 30, 3)  # here Pillow warns
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 30 // 2 - 1)
        with pytest.raises(UserError, match=r"bomb\.png has more than .* million pixels: shrink it") as error:
            read_image(tmp_path / "bomb.png")
        assert "\n" not in str(error.value)
        assert not recwarn.list

    def test_pillow_images_arrays_and_tensors(self):
        assert read_image(Image.new("L", (3, 2), 7)).tolist() == np.full((2, 3, 3), 7).tolist()
        array = np.random.default_rng(0).integers(0, 256, (2, 3, 4), np.uint8)
        rgb = array[..., :3].copy()
        assert read_image(rgb) is rgb
        grey = read_image(array[..., 0])
        assert all((grey[..., channel] == array[..., 0]).all() for channel in range(3))
        assert (read_image(array[..., :1]) == grey).all()
        array[0, 0, 3], array[1, 1, 3] = 0, 255
        assert read_image(array)[0, 0].tolist() == [255] * 3
        assert (read_image(array)[1, 1] == rgb[1, 1]).all()
        assert (read_image(torch.from_numpy(rgb.transpose(2, 0, 1).copy())) == rgb).all()

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((4, 4, 3), np.complex64),
            np.zeros((4, 4, 3), object),
            np.zeros((5, 4, 2), np.uint8),
            np.zeros((2, 4, 9), np.uint8),
            np.zeros((2, 4, 4, 3), np.uint8),
            np.zeros((0, 4, 3), np.uint8),
            torch.zeros(0, 4, 3),
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        ],
    )
    def test_other_arrays_and_tensors_are_refused(self, array):
        with pytest.raises(UserError, match=r"uint8 (array|tensor) .* not (complex64|object|float32|uint8) \["):
            read_image(array)

    @pytest.mark.parametrize("kind", ["array", "tensor"])
    @pytest.mark.parametrize("order", ["HWC", "CHW"])
    @pytest.mark.parametrize(
        "convert",
        [
            lambda values: values,
            lambda values: values.astype(np.float32),
            lambda values: values.astype(np.int64),
            lambda values: values / 255,
            lambda values: (values / 255).astype(np.float16),
            lambda values: values / 255 + 0.001 * (values == 255),  # an interpolation that exceeds 1
            lambda values: values.astype(np.uint16) * 257,
        ],
    )
    def test_values_of_every_type_in_every_order(self, kind, order, convert):
        rgb = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
        values = convert(rgb) if order == "HWC" else convert(rgb).transpose(2, 0, 1)
        given = values if kind == "array" else torch.from_numpy(np.ascontiguousarray(values))
        assert (read_image(given) == rgb).all()

    @pytest.mark.parametrize(
        "view",
        [
            lambda rgb: rgb[..., ::-1],
            np.fliplr,
            np.flipud,
            np.asfortranarray,
            np.rot90,
            lambda rgb: rgb[::2, ::-3],
            lambda rgb: rgb[..., 0][::-1],
            lambda rgb: np.dstack([rgb, np.full_like(rgb[..., :1], 255)])[:, ::-1],
            lambda rgb: (rgb.astype(np.uint16) * 257).astype(">u2"),
            lambda rgb: (rgb / 255).astype(">f4")[::-1],
        ],
    )
    def test_every_view_and_byte_order_of_an_array(self, view):
        given = view(np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8))
        read = read_image(given)
        assert read.flags.c_contiguous
        scale = {"u2": 1 / 257, "f4": 255}.get(given.dtype.str[1:], 1)
        expected = np.rint(given * scale)
        assert (read == (expected[..., None] if expected.ndim == 2 else expected[..., :3])).all()

    def test_masks_and_other_kinds_of_tensors(self):
        mask = np.eye(4, 5, dtype=bool)
        for given in (mask, torch.from_numpy(mask), torch.from_numpy(mask)[None], mask[..., None]):
            assert (read_image(given) == 255 * mask[..., None]).all()
        fractions = torch.tensor([0.0, 0.25, 1.0]).expand(3, 2, 3).bfloat16().requires_grad_()
        assert read_image(fractions)[0, :, 0].tolist() == [0, 64, 255]
        transparent = torch.zeros(4, 5, 6)
        assert (read_image(transparent) == 255).all()

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (np.array([-1.0, 1.0]), "float64 .* from -1 to 1: undo a normalisation"),
            (np.array([0.0, np.nan]), "from nan to nan"),
            (np.array([0.0, np.inf]), "from 0 to inf"),
            (np.array([0.0, 1.2]), "from 0 to 1.2"),
            (np.array([0, 300]), "int64 .* from 0 to 300"),
            (np.array([-1, 3], np.int8), "int8 .* from -1 to 3"),
            (torch.tensor([-2.1, 2.6]), "float32 .* from -2.1 to 2.6"),
        ],
    )
    def test_values_that_are_no_colours_get_one_line(self, values, said):
        with pytest.raises(UserError, match=said) as error:
            read_image(values.reshape(1, 2))
        assert "\n" not in str(error.value)

    @pytest.mark.slow
    def test_what_is_no_image_at_all_gets_one_line(self):
        """In a process of its own, where no test checks types first."""
        program = """
from pem_lightning.inference.sources import read_image
for source in (None, 5, b"x", {}):
    try:
        read_image(source)
    except Exception as error:
        print(type(error).__name__, error)
"""
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        lines = run.stdout.splitlines()
        expected = "UserError an image must be a file's path, a Pillow image, an array or a tensor, not "
        assert [line.startswith(expected) for line in lines] == [True] * 4
        assert "cv2.imread" in lines[0]

    def test_files_that_are_no_complete_image_are_named(self, tmp_path):
        broken = {"text.png": b"no image", "empty.jpg": b"", "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n"}
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
        for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
            buffer = io.BytesIO()
            photo.save(buffer, kind)
            broken[f"cut.{kind.lower()}"] = buffer.getvalue()[: len(buffer.getvalue()) // 2]
        for name, content in broken.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(UserError, match=name) as error:
                read_image(tmp_path / name)
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"gone\.png does not exist"):
            read_image(tmp_path / "gone.png")
        with pytest.raises(UserError, match="cannot read"):
            read_image(tmp_path)
        with Image.open(tmp_path / "cut.bmp") as image, pytest.raises(UserError, match="complete image"):
            read_image(image)


def frame(i, height=48, width=64):
    """A grey that tells the number, left of red."""
    picture = np.full((height, width, 3), 8 * i, np.uint8)
    picture[:, width // 2 :] = 200, 0, 0
    return picture


def numbers(frames):
    """What `frame` was called with."""
    return [round(picture[5:-5, 5:20].mean() / 8) for picture in frames]


def write(path, count=12, codec="mp4v"):
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), 10, (64, 48))
    for i in range(count):
        writer.write(frame(i)[..., ::-1])
    writer.release()
    return path


def test_what_is_a_stream():
    assert all(is_stream(source) for source in (0, "1", "rtsp://camera/1", "http://host/x.mp4"))
    assert not any(is_stream(source) for source in ("x.mp4", "./0"))


def test_a_folder_with_a_number_for_its_name_is_no_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.mp4").rename("7")
    (tmp_path / "2024").mkdir()
    assert not any(is_stream(source) for source in ("2024", 2024, "7"))
    assert len(list(VideoReader("7").frames())) == 12


class TestVideoReader:
    @pytest.mark.parametrize(("name", "codec"), [("x.mp4", "mp4v"), ("x.avi", "MJPG"), ("x.mkv", "mp4v")])
    def test_reads_all_frames_as_rgb(self, tmp_path, name, codec):
        reader = VideoReader(write(tmp_path / name, codec=codec))
        assert (reader.fps, reader.num_frames) == (10, 12)
        frames = list(reader.frames())
        assert numbers(frames) == list(range(12))
        assert numbers(VideoReader(tmp_path / name).frames(5)) == [0, 5, 10]
        assert frames[0].shape == (48, 64, 3)
        assert np.abs(frames[0][10, 50].astype(int) - [200, 0, 0]).max() < 30

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


def read(path):
    return list(VideoReader(path).frames())


def codec_of(path):
    return int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little")


class Camera:
    """Stands in for OpenCV's capture: frames that tell their number, at a speed of its own and as `gate` lets them."""

    def __init__(self, fps, count=10**6, fails_at=None, gate=None):
        self.start, self.fps, self.count, self.fails_at, self.gate = time.monotonic(), fps, count, fails_at, gate
        self.number = -1

    def isOpened(self):  # noqa: N802
        return True

    def get(self, prop):
        return {cv2.CAP_PROP_FPS: self.fps}.get(prop, -1.0)

    @property
    def now(self):
        """The number of the newest frame that a camera without a memory would give."""
        return int((time.monotonic() - self.start) * self.fps)

    def grab(self):
        self.number += 1
        if self.number == self.fails_at:
            raise OSError("unplugged")
        time.sleep(max(0.0, self.start + self.number / self.fps - time.monotonic()))
        assert self.gate is None or self.gate.acquire(timeout=60)
        return self.number < self.count

    def retrieve(self):
        return True, np.full((4, 4, 3), self.number % 256, np.uint8)


class TestLiveSource:
    def reader(self, monkeypatch, camera):
        monkeypatch.setattr(cv2, "VideoCapture", lambda *args: camera)
        return VideoReader("0")

    def test_gives_the_newest_frame_and_counts_the_others(self, monkeypatch):
        camera = Camera(fps=50.0, count=200)
        reader = self.reader(monkeypatch, camera)
        assert reader.is_live
        taken = []
        for picture in reader.frames():
            taken.append(int(picture[0, 0, 0]))
            if len(taken) == 6:
                break
            time.sleep(0.2)  # ten frames
        assert taken == sorted(set(taken))
        assert taken[-1] >= 30  # of about 50 by then; one after the other it would be 5
        assert reader.dropped >= taken[-1] - 5
        assert reader.dropped + len(taken) - 1 <= camera.number + 1

    @pytest.mark.parametrize("every", [1, 3])
    def test_all_of_them_where_there_is_time(self, monkeypatch, every):
        gate = threading.Semaphore(1)  # a frame comes when the one before it was taken, however slow the machine is
        reader = self.reader(monkeypatch, Camera(fps=1000.0, count=8, gate=gate))
        taken = []
        for picture in reader.frames(every):
            taken.append(int(picture[0, 0, 0]))
            gate.release(every)
        assert taken == list(range(0, 8, every))
        assert reader.dropped == 0

    def test_errors_appear_where_frames_are_used_and_the_thread_ends(self, monkeypatch):
        alive = threading.active_count()
        frames = self.reader(monkeypatch, Camera(fps=20.0, fails_at=2)).frames()
        with pytest.raises(OSError, match="unplugged"):
            list(frames)
        unfinished = self.reader(monkeypatch, Camera(fps=100.0)).frames()
        next(unfinished)
        unfinished.close()
        assert threading.active_count() == alive

    def test_files_are_not_live_and_give_every_frame(self, tmp_path):
        reader = VideoReader(write(tmp_path / "x.mp4"))
        assert not reader.is_live
        taken = []
        for picture in reader.frames():
            taken.append(picture)
            time.sleep(0.02)
        assert numbers(taken) == list(range(12))


FFMPEG = """
import sys
from fractions import Fraction
import cv2, numpy as np
after = dict(zip(sys.argv, sys.argv[1:]))
width, height = map(int, after["-video_size"].split("x"))
path, codec = sys.argv[-1].removeprefix("file:"), cv2.VideoWriter.fourcc(*"mp4v")
writer = cv2.VideoWriter(path, cv2.CAP_FFMPEG, codec, float(Fraction(after["-framerate"])), (width, height))
while frame := sys.stdin.buffer.read(width * height * 3):
    writer.write(np.frombuffer(frame, np.uint8).reshape(height, width, 3))
writer.release()
"""


class TestVideoWriter:
    @pytest.mark.parametrize("fps", [10, 29.97, 0.5])
    def test_what_is_written_is_read_again(self, tmp_path, fps):
        path = tmp_path / "new" / "folder" / "x.mp4"
        with VideoWriter(path, fps) as writer:
            for i in range(6):
                writer.write(frame(i))
            assert not path.exists()
        assert VideoReader(path).fps == pytest.approx(fps, abs=0.01)
        frames = read(path)
        assert numbers(frames) == list(range(6))
        assert np.abs(frames[0][10, 50].astype(int) - [200, 0, 0]).max() < 30
        assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]

    @pytest.mark.parametrize(("size", "even"), [((1, 1), (2, 2)), ((33, 64), (34, 64)), ((48, 65), (48, 66))])
    def test_odd_sides_get_one_pixel_more(self, tmp_path, size, even):
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(3, *size))
        assert read(tmp_path / "x.mp4")[0].shape == (*even, 3)

    def test_a_size_that_changes(self, tmp_path):
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(1))
            writer.write(frame(2, 96, 128))
        frames = read(tmp_path / "x.mp4")
        assert numbers(frames) == [1, 2]
        assert frames[1].shape == (48, 64, 3)

    def test_an_error_leaves_a_whole_video(self, tmp_path):
        writer = VideoWriter(tmp_path / "x.mp4", 10)
        writer.write(frame(1))
        with pytest.raises(KeyboardInterrupt), writer:
            raise KeyboardInterrupt
        assert numbers(read(tmp_path / "x.mp4")) == [1]

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

    def test_h264_by_ffmpeg(self, tmp_path, monkeypatch):
        if shutil.which("ffmpeg") is None:
            pytest.skip("needs the program ffmpeg")
        monkeypatch.setitem(sys.modules, "av", None)
        with VideoWriter(tmp_path / "x = 1.mp4", 29.97) as writer:
            for i in range(6):
                writer.write(frame(i, 47, 63))
        assert codec_of(tmp_path / "x = 1.mp4") == b"h264"
        assert numbers(read(tmp_path / "x = 1.mp4")) == list(range(6))

    def test_browsers_play_it(self, tmp_path):
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(1))
        assert codec_of(tmp_path / "x.mp4") in (b"VP90", b"h264", b"avc1")

    @pytest.mark.parametrize(
        ("missing", "codec", "warnings"),
        [((), b"VP90", 0), (("vp09",), b"FMP4", 1), (("avc1", "mp4v"), b"VP90", 0)],
    )
    def test_other_encoders_stand_in(self, tmp_path, monkeypatch, caplog, missing, codec, warnings):
        """Also for one that opens and then writes nothing, as hardware encoders do without their hardware."""
        real = VideoWriter._encoder

        def without(self, name, size):
            assert "av" not in sys.modules or sys.modules["av"] is None
            return real(self, "none" if name in missing else name, size)

        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.setattr(VideoWriter, "_encoder", without)
        monkeypatch.setattr(sources, "CODECS", ("none", *sources.CODECS[2:]))
        with VideoWriter(tmp_path / "x.mp4", 10) as writer:
            writer.write(frame(1))
        assert codec_of(tmp_path / "x.mp4") == codec
        assert numbers(read(tmp_path / "x.mp4")) == [1]
        assert caplog.text.count("browsers will not play") == warnings

    def test_without_any_encoder_one_line(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.setattr(VideoWriter, "_works", lambda self, codec, size: False)
        with (
            pytest.raises(UserError, match=r"no encoder for it; .* save=masks"),
            VideoWriter(tmp_path / "x.mp4", 1) as w,
        ):
            w.write(frame(0))
        assert not list(tmp_path.iterdir())

    def test_h264_by_pyav(self, tmp_path):
        pytest.importorskip("av")
        with VideoWriter(tmp_path / "x.mp4", 29.97) as writer:
            for i in range(6):
                writer.write(frame(i, 47, 63))
        assert codec_of(tmp_path / "x.mp4") == b"h264"
        assert numbers(read(tmp_path / "x.mp4")) == list(range(6))
        assert VideoReader(tmp_path / "x.mp4").fps == pytest.approx(29.97, abs=0.01)

    @pytest.mark.parametrize(("program", "codec"), [(FFMPEG, b"FMP4"), ("", b"VP90")])
    def test_the_program_ffmpeg(self, tmp_path, monkeypatch, program, codec):
        """A stand-in for it, which writes another codec, and one that fails, as a build without H.264 does."""
        monkeypatch.setitem(sys.modules, "av", None)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        (tmp_path / "ffmpeg").write_text(f"#!{sys.executable}\n{program}")
        (tmp_path / "ffmpeg").chmod(0o755)
        with VideoWriter(tmp_path / "x.mp4", 29.97) as writer:
            for i in range(6):
                writer.write(frame(i, 47, 63))
        assert codec_of(tmp_path / "x.mp4") == codec
        assert numbers(read(tmp_path / "x.mp4")) == list(range(6))
        assert VideoReader(tmp_path / "x.mp4").fps == pytest.approx(29.97, abs=0.01)

    def test_a_lost_file_is_noticed(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "av", None)  # which would write it anew, and so would ffmpeg
        monkeypatch.setattr(sources, "CODECS", sources.CODECS[1:])
        writer = VideoWriter(tmp_path / "x.mp4", 10)
        writer.write(frame(0))
        next(tmp_path.iterdir()).unlink()
        with pytest.raises(UserError, match="make room"), writer:
            pass


class TestPrefetch:
    def test_a_few_items_are_made_before_they_are_used(self):
        made = []

        def items():
            for i in range(100):
                made.append(i)
                yield i

        with prefetch(items(), depth=3) as ahead:
            assert next(ahead) == 0
            deadline = time.monotonic() + 5
            while len(made) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.05)
            assert made == [0, 1, 2, 3]  # one used, three waiting
            assert list(ahead) == list(range(1, 100))

    def test_errors_appear_where_the_items_are_used(self):
        def fail():
            yield 1
            raise ValueError("broken")

        with prefetch(fail()) as items:
            assert next(items) == 1
            with pytest.raises(ValueError, match="broken"):
                next(items)

    def test_nothing_runs_on_when_it_is_left(self):
        alive = threading.active_count()
        with prefetch(iter(range(10**9))) as first, prefetch(first) as second:
            assert next(second) == 0
        assert threading.active_count() == alive
