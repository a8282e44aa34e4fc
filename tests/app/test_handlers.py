import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pem_lightning.app.handlers import (
    Limits,
    Segmenter,
    find_port,
    found_at,
    legend,
    own_folder,
    write_downloads,
    write_overlay,
)
from pem_lightning.inference.sources import VideoReader, VideoWriter
from pem_lightning.types import UserError
from tests.inference.toy import Stripes, predictor

LIMITS = Limits(megabytes=1, pixels=100_000, seconds=2)


@pytest.fixture
def segmenter():
    return Segmenter(predictor(), lambda precision: Stripes(), "float32", LIMITS)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "street.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)).save(path)
    return path


def write_video(path, frames, fps=10, size=(64, 48)):
    with VideoWriter(path, fps) as writer:
        for _ in range(frames):
            writer.write(np.zeros((size[1], size[0], 3), np.uint8))
    return path


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_a_photograph_gives_what_the_predictor_gives(segmenter, photo, tmp_path, task):
    mine = segmenter.photo(photo, segmenter.default._replace(task=task)).result
    theirs = predictor(task, score_threshold=0.5)(photo)
    for kind in ("panoptic", "semantic"):
        a, b = getattr(mine, kind), getattr(theirs, kind)
        assert (a is None and b is None) or a.equal(b)
    assert mine.segments == theirs.segments
    assert mine.to_coco() == theirs.to_coco()
    assert np.array_equal(np.asarray(Image.open(write_overlay(mine, tmp_path, 0.3))), theirs.overlay(0.3))
    ids, coco = write_downloads(mine, tmp_path)
    assert json.loads(coco.read_text()) == theirs.to_coco()
    theirs.save(tmp_path / "theirs")
    if task != "instance":
        assert np.array_equal(Image.open(ids), Image.open(tmp_path / "theirs" / f"street_{task}.png"))


def test_settings_change_the_result(segmenter, photo):
    def found(**changes):
        return {row.name for row in legend(segmenter.photo(photo, segmenter.default._replace(**changes)).result)}

    assert found() == {"car", "sky"}
    assert found(classes=("sky",)) == {"sky"}
    assert found(object_mask_threshold=1.0) == set()
    assert found(task="instance") == {"car"}
    with pytest.raises(UserError, match=r"no class sk \(did you mean sky"):
        found(classes=("sk",))
    with pytest.raises(UserError, match="no task depth"):
        found(task="depth")


def test_precisions_share_one_network_each(photo):
    made = []
    segmenter = Segmenter(predictor(), lambda precision: made.append(precision) or Stripes(), "float32", LIMITS)
    for precision in ("bfloat16", "float32", "bfloat16"):
        segmenter.photo(photo, segmenter.default._replace(precision=precision))
    assert made == ["bfloat16"]


def test_the_legend_counts_objects_and_shares_of_pixels(segmenter, photo):
    car, sky = sorted(legend(segmenter.photo(photo, segmenter.default).result))
    assert (car.name, car.color, car.objects) == ("car", (0, 0, 142), 1)
    assert (sky.name, sky.objects) == ("sky", None)
    assert car.share + sky.share == pytest.approx(1)
    semantic = legend(segmenter.photo(photo, segmenter.default._replace(task="semantic")).result)
    assert {row.objects for row in semantic} == {None}


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_a_click_names_the_segment(segmenter, photo, task):
    result = segmenter.photo(photo, segmenter.default._replace(task=task)).result
    found = found_at(result, 10, 20)
    mask = np.zeros((64, 128), bool)
    mask[:, : found.box[2]] = True
    assert (found.name, found.box[:2], found.area) == ("car", (0, 0), mask.sum())
    assert (found.score is None) == (task == "semantic")
    right = found_at(result, 120, 20)
    assert right is None if task == "instance" else right.name == "sky"
    assert found_at(result, 128, 0) is found_at(result, -1, 0) is None


def test_a_network_without_things_has_no_instances():
    info = predictor().info
    stuff = info.__class__("stuff", tuple(c.__class__(c.name, c.color, False, c.category_id) for c in info.classes))
    segmenter = Segmenter(predictor(info=stuff), lambda precision: Stripes(), "float32", LIMITS)
    assert segmenter.tasks == ("panoptic", "semantic")


def test_a_decompression_bomb_is_refused_by_its_header(segmenter, tmp_path, monkeypatch):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = tmp_path / "bomb.png"
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 1, 0, 0, 0, 0))
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    monkeypatch.setattr("pem_lightning.app.handlers.read_photo", pytest.fail)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=r"bomb\.png has 100000 x 100000 pixels, and the limit is 0\.1 million"):
        segmenter.photo(bomb, segmenter.default)
    assert before == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_a_wrong_file_is_one_line_that_names_no_folder(segmenter, tmp_path, content):
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"photo\.jpg") as error:
        segmenter.photo(path, segmenter.default)
    assert str(tmp_path) not in str(error.value)


def test_a_large_file_is_refused(segmenter, tmp_path):
    for name, segment in (("a.jpg", segmenter.photo), ("a.mp4", lambda *a: segmenter.video(*a, tmp_path / "b.mp4", 0))):
        (tmp_path / name).write_bytes(bytes(1_100_000))
        with pytest.raises(UserError, match=f"{name} has 1.1 MB, and the limit is 1: shrink or shorten it"):
            segment(tmp_path / name, segmenter.default)


def test_a_video_becomes_one_of_overlays(segmenter, tmp_path):
    source, parts = write_video(tmp_path / "in.mp4", 6), []
    video = segmenter.video(source, segmenter.default, tmp_path / "out.mp4", 1.0, parts.append)
    frames = list(VideoReader(tmp_path / "out.mp4").frames())
    assert video.frames == len(frames) == 6
    assert parts == pytest.approx([(i + 1) / 6 for i in range(6)])
    assert np.abs(frames[0][5, 5].astype(int) - (0, 0, 142)).max() < 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": 30}, "in.mp4 lasts 3 seconds, and the limit is 2"),
        ({"frames": 1, "size": (512, 256)}, "in.mp4 has 512 x 256 pixels"),
    ],
)
def test_a_long_or_large_video_is_refused(segmenter, tmp_path, arguments, message):
    source = write_video(tmp_path / "in.mp4", **arguments)
    with pytest.raises(UserError, match=message):
        segmenter.video(source, segmenter.default, tmp_path / "out.mp4", 1.0)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(
    "content", [b"", b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n", b"ffconcat version 1.0\nfile /etc/hosts\n"]
)
def test_a_playlist_is_no_video(segmenter, tmp_path, content):
    (tmp_path / "in.mp4").write_bytes(content)
    with pytest.raises(UserError, match=r"in\.mp4 is no video in MP4"):
        segmenter.video(tmp_path / "in.mp4", segmenter.default, tmp_path / "out.mp4", 1.0)


def test_a_server_that_stops_ends_its_video(segmenter, tmp_path):
    segmenter.stopped.set()
    with pytest.raises(UserError, match="the server stops"):
        segmenter.video(write_video(tmp_path / "in.mp4", 6), segmenter.default, tmp_path / "out.mp4", 1.0)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), True, "10"])
def test_impossible_limits(limit):
    with pytest.raises(UserError, match=r"max_seconds=.*above 0"):
        Segmenter(predictor(), Stripes, "float32", LIMITS._replace(seconds=limit))


def test_ports():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with pytest.raises(UserError, match=f"port={taken} is taken: choose another, e.g. port="):
            find_port("127.0.0.1", taken)
        assert find_port("127.0.0.1", 0) not in (0, taken)
    for host, port, message in (("127.0.0.1", 70_000, "from 0 to 65535"), ("192.0.2.1", 0, "host=192.0.2.1")):
        with pytest.raises(UserError, match=message):
            find_port(host, port)


def test_temporary_files_go_with_the_page(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setenv("GRADIO_TEMP_DIR", "theirs")
    with own_folder() as folder:
        assert tempfile.mkdtemp().startswith(str(folder))
    assert not folder.exists()
    assert not tempfile.gettempdir().startswith(str(folder))
