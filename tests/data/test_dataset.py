"""Reading files: the exact content or an error that names the file; and what missing and broken files do."""

from __future__ import annotations

import logging
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataModule
from pem_lightning.data.dataset import SegmentationDataset, distinct_color, read_map, read_rgb
from pem_lightning.data.synthetic import generate_synthetic
from pem_lightning.data.transforms import TrainTransform
from pem_lightning.types import Sample, UserError
from tests.data.damage import IDS, PHOTO, damages, encoded, outcome


class Numbers(SegmentationDataset):
    """Items 0 to 4, whose image is their number; some are broken."""

    def __init__(self, broken=(), problems=(), **arguments):
        files = {f"item{i}": (Path(f"item{i}.png"),) for i in range(5)}
        super().__init__(CITYSCAPES, files, problems, **arguments)
        self.broken = broken

    def read(self, index):
        if index in self.broken:
            raise UserError(f"item{index}.png is broken: mend it")
        return Sample(torch.full((3, 2, 2), index, dtype=torch.uint8), torch.zeros(2, 2).int(), (), self.names[index])


def test_items_in_order():
    dataset = Numbers(transform=lambda s: s._replace(name=s.name.upper()))
    assert len(dataset) == 5
    assert [sample.name for sample in dataset] == [f"ITEM{i}" for i in range(5)]
    assert dataset[-1].name == "ITEM4"
    for index in (5, -6):
        with pytest.raises(IndexError):
            dataset[index]


def test_stop_raises_the_first_problem_and_counts_the_others():
    with pytest.raises(UserError, match=r"^a\.png has no image: copy it \(and 2 more such problems\)$"):
        Numbers(problems=["a.png has no image: copy it", "b", "c"])
    with pytest.raises(UserError, match=r"^a\.png$"):
        Numbers(problems=["a.png"])
    for on_error in ("stop", "collect"):
        with pytest.raises(UserError, match=r"item2\.png is broken: mend it"):
            Numbers(broken={2}, on_error=on_error)[2]
    assert Numbers(problems=["a", "b"], on_error="collect").problems == ["a", "b"]


def test_skip_takes_the_next_readable_item_and_logs(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = Numbers(broken={0, 3, 4}, problems=["a.png has no image: copy it"], on_error="skip")
        assert [dataset[i].name for i in range(5)] == ["item1", "item1", "item2", "item1", "item1"]
        assert dataset[-1].name == "item1"
    assert "left out: a.png has no image: copy it" in caplog.text
    assert "skipped: item3.png is broken: mend it" in caplog.text
    with pytest.raises(UserError, match="none of the 5 items can be read"):
        Numbers(broken=range(5), on_error="skip")[3]


def test_generated_colors_differ():
    colors = np.array([distinct_color(index) for index in range(133)])
    distances = np.abs(colors[:, None] - colors).sum(-1) + 999 * np.eye(133, dtype=int)
    assert distances.min() >= 5


# Exact content, where plain decoding would change or swallow something.


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


@pytest.mark.parametrize(
    ("content", "message"),
    [(png(1, 1, 16, 2, bytes(7)), "16-bit colours"), (encoded(PHOTO, "JPEG"), r"map\.png is no PNG file")],
)
def test_refused_maps(tmp_path, content, message):
    path = tmp_path / "map.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
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


BOMBS = {
    **{f"{w}x{h}": png(w, h, 8, 0, bytes(10**6)) for w, h in [(2**31 - 1, 2**31 - 1), (16000, 11000), (0, 0), (5, 0)]},
    "text": png(1, 1, 8, 0, bytes(2), chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(10**8)))),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("read", [read_rgb, read_map])
def test_what_would_take_all_memory_or_time(tmp_path, content, read):
    path = tmp_path / "bomb.png"
    path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"bomb\.png.*: the cure$"):
        read(path, "the cure")
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


# Damaged files never hang a reader and never become a wrong sample.

FUZZ = settings(max_examples=50, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(read, path):
    """What is read, or None after an error that names the file and ends in the cure."""
    result, message = outcome(read, path, "the cure")
    assert message is None or (str(path) in message and message.endswith(": the cure"))
    return result


@FUZZ
@given(damages, st.sampled_from([(read_map, IDS), (read_rgb, PHOTO)]))
def test_damaged_png(tmp_path, damage, case):
    read, array = case
    path = tmp_path / "file.png"
    path.write_bytes(damage(encoded(array, "PNG")))
    found = read_or_refuse(read, path)
    assert found is None or np.array_equal(found, array)


@FUZZ
@given(damages, st.sampled_from(["JPEG", "BMP", "PPM", "TIFF", "WEBP"]))
def test_damaged_in_other_formats(tmp_path, damage, kind):
    """Their pixels carry no checksum; what decodes is at least a picture."""
    path = tmp_path / "photo"
    path.write_bytes(damage(encoded(PHOTO, kind)))
    image = read_or_refuse(read_rgb, path)
    assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_truncated_jpeg(tmp_path, options):
    path = tmp_path / "photo.jpg"
    data = encoded(PHOTO, "JPEG", **options)
    path.write_bytes(data)
    assert np.array_equal(read_rgb(path, ""), np.array(Image.open(path)))
    for length in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:length])
        assert read_or_refuse(read_rgb, path) is None, length


def test_workers_pass_the_broken_file_on_or_replace_it(tmp_path):
    root = generate_synthetic(tmp_path / "drawn", train=4, val=1, height=32, width=64)
    path = sorted((root / "leftImg8bit" / "train").rglob("*.png"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    transform = TrainTransform((32, 64), [32], None, color_jitter=False, flip=0.0)
    stop, skip = (
        CityscapesDataModule(root, batch_size=1, train_transform=transform, num_workers=1, on_error=on_error)
        for on_error in ("stop", "skip")
    )
    with pytest.raises(UserError, match=path.name):
        list(stop.train_dataloader())
    images = np.stack([batch.images[0].numpy() for batch in skip.train_dataloader()])
    assert len(images) == 4
    assert len(np.unique(images, axis=0)) == 3  # the third one stands in for the second
