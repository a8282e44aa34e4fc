"""Damaged files never hang a reader and never become a wrong sample: it is right, or an error names the file."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.cityscapes import CityscapesDataset
from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.dataset import read_map, read_rgb
from pem_lightning.data.semantic_folder import read_classes
from pem_lightning.files import id_to_rgb
from pem_lightning.types import UserError

RNG = np.random.default_rng(0)
PHOTO = np.asarray(Image.fromarray(RNG.integers(0, 256, (6, 9, 3), np.uint8)).resize((24, 16)))
IDS = RNG.choice(np.array([0, 7, 11, 24000, 26012], np.uint16), (16, 24))
SIGNATURES = [
    b"",
    b"\x89PNG\r\n\x1a\n",
    b"\xff\xd8\xff",
    b"II*\0",
    b"RIFF\x10\0\0\0WEBP",
    b"BM",
    b"P6 9 9 255\n",
    b"GIF89a",
]

FUZZ = settings(max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encoded(array: np.ndarray, kind: str, **options) -> bytes:
    Image.fromarray(array).save(buffer := io.BytesIO(), kind, **options)
    return buffer.getvalue()


places = st.floats(0, 1, exclude_max=True)
truncations = places.map(lambda place: lambda data: data[: int(place * len(data))])


def flipped(flips):
    def apply(data):
        damaged = bytearray(data)
        for place, mask in flips:
            damaged[int(place * len(data))] ^= mask
        return bytes(damaged)

    return apply


flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=8).map(flipped)
garbage = st.tuples(st.sampled_from(SIGNATURES), st.binary(max_size=300)).map(
    lambda parts: lambda data: b"".join(parts)
)
insertions = st.tuples(places, st.binary(min_size=1, max_size=50)).map(
    lambda p: lambda data: data[: int(p[0] * len(data))] + p[1] + data[int(p[0] * len(data)) :]
)
damages = st.one_of(truncations, flips, garbage, insertions)


def outcome(function, *arguments):
    """A result and None, or None and the error of one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow says about damaged files
        try:
            return function(*arguments), None
        except UserError as error:
            message = str(error)
    assert "\n" not in message
    return None, message


def read_or_refuse(read, path):
    """What is read, or None after an error that names the file and ends in the cure."""
    result, message = outcome(read, path, "the cure")
    assert message is None or (str(path) in message and message.endswith(": the cure"))
    return result


@FUZZ
@given(damages)
def test_damaged_map(tmp_path, damage):
    path = tmp_path / "map.png"
    path.write_bytes(damage(encoded(IDS, "PNG")))
    values = read_or_refuse(read_map, path)
    assert values is None or np.array_equal(values, IDS)


@FUZZ
@given(damages)
def test_damaged_png_photo(tmp_path, damage):
    path = tmp_path / "photo.png"
    path.write_bytes(damage(encoded(PHOTO, "PNG")))
    image = read_or_refuse(read_rgb, path)
    assert image is None or np.array_equal(image, PHOTO)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_truncated_jpeg(tmp_path, options):
    """At every single byte."""
    path = tmp_path / "photo.jpg"
    data = encoded(PHOTO, "JPEG", **options)
    path.write_bytes(data)
    assert np.array_equal(read_rgb(path, ""), np.array(Image.open(path)))
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert read_or_refuse(read_rgb, path) is None, length


@FUZZ
@given(damages)
def test_damaged_jpeg(tmp_path, damage):
    """Pixels of a JPEG carry no checksum; what decodes is at least a picture."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(damage(encoded(PHOTO, "JPEG")))
    image = read_or_refuse(read_rgb, path)
    assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("BMP", {}), ("PPM", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_truncated_in_other_formats(tmp_path, kind, options):
    path = tmp_path / "photo"
    data = encoded(PHOTO, kind, **options)
    path.write_bytes(data)
    assert np.array_equal(read_rgb(path, ""), PHOTO)
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        image = read_or_refuse(read_rgb, path)
        assert image is None or np.array_equal(image, PHOTO), length


@settings(FUZZ, max_examples=60)
@given(damages, st.sampled_from(["BMP", "PPM", "TIFF", "WEBP"]))
def test_damaged_in_other_formats(tmp_path, damage, kind):
    path = tmp_path / "photo"
    path.write_bytes(damage(encoded(PHOTO, kind)))
    image = read_or_refuse(read_rgb, path)
    assert image is None or (image.dtype == np.uint8 and image.ndim == 3 and image.size)


@settings(FUZZ, max_examples=100)
@given(damages, st.sampled_from([0, 1]))
def test_damaged_sample(tmp_path, damage, which):
    paths = (
        tmp_path / "leftImg8bit" / "train" / "ulm" / "ulm_0_0_leftImg8bit.png",
        tmp_path / "gtFine" / "train" / "ulm" / "ulm_0_0_gtFine_instanceIds.png",
    )
    for path, array in zip(paths, (PHOTO, IDS), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(array, "PNG"))
    dataset = CityscapesDataset(tmp_path, "train")
    whole = dataset[0]
    paths[which].write_bytes(damage(paths[which].read_bytes()))
    sample, message = outcome(dataset.__getitem__, 0)
    if message:
        assert str(paths[which]) in message
    else:
        assert np.array_equal(sample.image, whole.image)
        assert np.array_equal(sample.panoptic, whole.panoptic)


# Texts beside the images.

COCO = {
    "images": [{"id": 1, "file_name": "a.png", "height": 16, "width": 24}],
    "annotations": [
        {
            "image_id": 1,
            "file_name": "a.png",
            "segments_info": [{"id": i, "category_id": 3, "iscrowd": 0} for i in (7, 11, 24000, 26012)],
        }
    ],
    "categories": [{"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]}],
}
TEXTS = st.text(max_size=5) | st.sampled_from(["", ".", "..", "/", "a/../..", "\0", "x" * 300])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    ("images",),
    ("images", 0),
    ("images", 0, "id"),
    ("images", 0, "file_name"),
    ("annotations",),
    ("annotations", 0),
    ("annotations", 0, "image_id"),
    ("annotations", 0, "file_name"),
    ("annotations", 0, "segments_info"),
    ("annotations", 0, "segments_info", 0),
    ("annotations", 0, "segments_info", 0, "id"),
    ("annotations", 0, "segments_info", 0, "category_id"),
    ("annotations", 0, "segments_info", 0, "iscrowd"),
    ("categories",),
    ("categories", 0),
    ("categories", 0, "id"),
    ("categories", 0, "name"),
    ("categories", 0, "isthing"),
    ("categories", 0, "color"),
]


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("coco")
    for folder, array in (("images", PHOTO), ("maps", id_to_rgb(IDS.astype(np.int32)))):
        (root / folder).mkdir()
        (root / folder / "a.png").write_bytes(encoded(array, "PNG"))
    return root


def read_coco(root: Path, text: str | bytes) -> None:
    path = root / "maps.json"
    path.write_bytes(text.encode(errors="surrogatepass") if isinstance(text, str) else text)
    sample, message = outcome(lambda: CocoPanopticDataset(path, root / "images")[0])
    if message:
        assert str(root) in message
    else:
        assert np.array_equal(sample.panoptic == 0, IDS == 0)
        assert {segment.class_id for segment in sample.segments} == {0}


@settings(max_examples=150, deadline=5000)
@given(st.data())
def test_wrong_values_in_a_panoptic_json(coco, data):
    content = json.loads(json.dumps(COCO))
    field = data.draw(st.sampled_from(FIELDS))
    place = content
    for key in field[:-1]:
        place = place[key]
    place[field[-1]] = data.draw(JUNK)
    read_coco(coco, json.dumps(content))


@settings(max_examples=100, deadline=5000)
@given(damages)
def test_damaged_panoptic_json(coco, damage):
    read_coco(coco, damage(json.dumps(COCO).encode()))


@settings(max_examples=150, deadline=5000)
@given(damages | JUNK.map(lambda junk: lambda data: json.dumps(junk).encode(errors="surrogatepass")))
def test_damaged_class_list(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "classes.yaml"
    path.write_bytes(damage(b"classes:\n- road\n- {name: field, color: [0, 255, 0], id: 3}\nvoid: [255]\n"))
    classes, message = outcome(read_classes, path)
    if message:
        assert str(path) in message
    else:
        assert 1 <= classes.info.num_classes <= 255
        assert not classes.void & set(classes.info.category_ids)
