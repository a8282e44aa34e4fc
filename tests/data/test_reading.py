"""Exact content of image files, where plain decoding would change or swallow something."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.dataset import read_map, read_rgb
from pem_lightning.types import UserError

PHOTO = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)).resize((24, 16)))


def encoded(array: np.ndarray, kind: str) -> bytes:
    Image.fromarray(array).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body


@pytest.mark.parametrize("color_type", [0, 3])
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_maps_of_few_bits_keep_their_values(tmp_path, depth, color_type):
    """As PNG optimisers write maps of few classes, grey or with a palette."""
    values = np.arange(16) % 2**depth
    bits = "".join(f"{value:0{depth}b}" for value in values)
    row = b"\0" + int(bits, 2).to_bytes(2 * depth, "big")
    palette = [chunk(b"PLTE", bytes(3 * 2**depth))] if color_type == 3 else []
    path = tmp_path / "map.png"
    path.write_bytes(png(16, 1, depth, color_type, row, *palette))
    read = read_map(path, "")
    assert read.dtype == np.uint8
    assert read.tolist() == [values.tolist()]


def test_sixteen_bits(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(encoded(np.array([[0, 255, 256, 65535]], np.uint16), "PNG"))
    values = read_map(path, "")
    assert (values.dtype, values.tolist()) == (np.uint16, [[0, 255, 256, 65535]])
    assert read_rgb(path, "")[0, :, 0].tolist() == [0, 1, 1, 255]  # not clipped


def test_colours_of_sixteen_bits_are_refused(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(png(1, 1, 16, 2, bytes(7)))
    with pytest.raises(UserError, match="16-bit colours"):
        read_map(path, "")


def test_a_lossy_map_is_refused_whatever_its_name(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(encoded(PHOTO[..., 0].copy(), "JPEG"))
    with pytest.raises(UserError, match=r"map\.png is no PNG file"):
        read_map(path, "")


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_photos_of_any_mode(tmp_path, mode):
    picture = Image.fromarray(PHOTO).convert(mode)
    path = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    picture.save(path)
    image = read_rgb(path, "")
    assert image.shape == PHOTO.shape
    if mode not in ("CMYK", "LA"):
        assert np.array_equal(image, np.asarray(picture.convert("RGB")))


def test_photos_are_read_upright(tmp_path):
    path = tmp_path / "photo.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(PHOTO).save(path, exif=exif)
    assert np.array_equal(read_rgb(path, ""), np.rot90(PHOTO, -1))


# What would take all memory or time.


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (60000, 60000), (16000, 11000), (0, 0), (5, 0)])
@pytest.mark.parametrize("read", [read_rgb, read_map])
def test_huge_declared_size(tmp_path, size, read):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(*size, 8, 0, bytes(10**6)))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"bomb\.png.*: the cure$"):
        read(path, "the cure")
    assert time.monotonic() - start < 5


def test_bombs_in_texts(tmp_path):
    path = tmp_path / "bomb.png"
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8)))
    path.write_bytes(png(1, 1, 8, 0, bytes(2), text))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"bomb\.png.*: the cure$"):
        read_map(path, "the cure")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"GIF89a", b"\0" * 500])
def test_other_formats_are_not_even_tried(tmp_path, content):
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match="it is none of PNG, JPEG"):
        read_rgb(path, "")


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png does not exist: the cure"):
        read_rgb(tmp_path / "nothing.png", "the cure")
    with pytest.raises(UserError, match=r"cannot read .*: the cure"):
        read_map(tmp_path, "the cure")
