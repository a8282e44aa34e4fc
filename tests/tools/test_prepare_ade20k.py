from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data import ade20k
from pem_lightning.data.ade20k import ADE20K, ADE20KDataModule
from pem_lightning.data.targets import build_target
from pem_lightning.files import replace_file, rgb_to_id
from pem_lightning.processes import stop_in_order
from pem_lightning.tools import prepare_ade20k
from pem_lightning.tools.prepare_ade20k import main, merge, prepare_split
from pem_lightning.types import UserError
from tests.jobs import exit_code, in_group
from tests.training.killing import signal_group

WALL, SKY, BED, PERSON = 1, 3, 8, 13  # values in the semantic map
BED_INSTANCE, PERSON_INSTANCE = 1, 4  # categories in the instance map


def instance_map(category, number):
    category = np.asarray(category, np.uint8)
    return np.stack([category, np.asarray(number, np.uint8), np.zeros_like(category)], -1)


def write(root, name, semantic, instances, split="training"):
    semantic = np.asarray(semantic, np.uint8)
    picture = np.random.default_rng(0).integers(0, 256, (*semantic.shape, 3), np.uint8)
    for folder, suffix, array in (
        ("images", "jpg", picture),
        ("annotations", "png", semantic),
        ("annotations_instance", "png", instances),
    ):
        path = root / folder / split / f"{name}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def root(tmp_path):
    """Three training images and one for validation, all of odd sizes."""
    rng = np.random.default_rng(0)
    for split, names in (("training", ["a", "b", "c"]), ("validation", ["d"])):
        for name in names:
            number = rng.integers(0, 3, (9, 7))
            category = np.array([0, BED_INSTANCE, PERSON_INSTANCE])[number]
            write(tmp_path, name, rng.choice([0, WALL, SKY, BED], (9, 7)), instance_map(category, number), split)
    return tmp_path


def call(root, workers=0):
    return main([str(root), "--workers", str(workers)])


def test_instances_lie_on_stuff_and_semantic_things_are_not_used():
    semantic = np.array([[WALL, WALL, BED, BED, 0, SKY]], np.uint8)
    instances = instance_map([[0, 4, 1, 0, 4, 0]], [[0, 1, 2, 0, 1, 0]])
    ids, segments = merge(semantic, instances)
    assert ids.tolist() == [[WALL, 257, 258, 0, 257, SKY]]
    assert [(s["id"], s["category_id"], s["area"], s["bbox"], s["iscrowd"]) for s in segments] == [
        (WALL, 0, 1, [0, 0, 1, 1], 0),
        (SKY, 2, 1, [5, 0, 1, 1], 0),
        (257, 12, 2, [1, 0, 4, 1], 0),
        (258, 7, 1, [2, 0, 1, 1], 0),
    ]
    ids, segments = merge(np.full((2, 2), WALL, np.uint8), instance_map(np.full((2, 2), 4), np.full((2, 2), 255)))
    assert (ids == 256 + 255).all()
    assert [(s["category_id"], s["area"]) for s in segments] == [(0, 0), (12, 4)]  # a hidden segment has no pixel


def test_every_thing_class_has_its_instance_category():
    """As in the official mapping, which the table of classes repeats."""
    category = np.arange(1, 101).reshape(10, 10)
    _, segments = merge(np.zeros((10, 10), np.uint8), instance_map(category, category))
    assert [s["category_id"] for s in segments] == sorted(ADE20K.thing_classes)
    rows = Path(ade20k.__file__).with_name("ade20k_classes.csv").read_text().splitlines()[1:]
    official = {int(r[-4]): int(r[0]) for r in csv.reader(rows) if r[-4]}
    assert {s["id"] - 256: s["category_id"] for s in segments} == official


@pytest.mark.parametrize(
    ("semantic", "category", "number", "message"),
    [
        ([[151]], [[0]], [[0]], "semantic map has the value 151"),
        ([[1]], [[101]], [[1]], "instance 1 has the category 101"),
        ([[1]], [[0]], [[1]], "instance 1 has the category 0"),
        ([[1, 1]], [[1, 4]], [[9, 9]], "instance 9 has several categories"),
    ],
)
def test_undefined_values(semantic, category, number, message):
    with pytest.raises(ValueError, match=message):
        merge(np.array(semantic, np.uint8), instance_map(category, number))


@given(
    semantic=st.lists(st.integers(0, 150), min_size=6, max_size=6),
    number=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
@settings(max_examples=30, deadline=None)
def test_pixel_by_pixel(semantic, number):
    category = [[0, 1, 4, 100][n] for n in number]
    ids, segments = merge(np.array([semantic], np.uint8), instance_map([category], [number]))
    kinds = {s["id"]: s for s in segments}
    for value, instance, got in zip(semantic, number, ids[0].tolist(), strict=True):
        if instance:
            assert kinds[got]["category_id"] == [None, 7, 12, 149][instance]
        elif value and not ADE20K.classes[value - 1].is_thing:
            assert kinds[got]["category_id"] == value - 1
        else:
            assert got == 0
    assert sum(s["area"] for s in segments) == (ids != 0).sum()


def test_it_writes_what_the_data_module_reads(root, capsys):
    assert call(root) == 0
    printed = capsys.readouterr().out
    assert "train: 3 images (3 made now, 0 had been made before), 6 things and 6 stuff segments" in printed
    assert "val: 1 images" in printed
    content = json.loads((root / "ade20k_panoptic_train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [category["id"] for category in content["categories"]] == list(range(150))
    for annotation in content["annotations"]:
        ids = rgb_to_id(np.array(Image.open(root / "ade20k_panoptic_train" / annotation["file_name"])))
        expected, segments = merge(
            np.array(Image.open(root / "annotations" / "training" / annotation["file_name"])),
            np.array(Image.open(root / "annotations_instance" / "training" / annotation["file_name"])),
        )
        assert np.array_equal(ids, expected)
        assert annotation["segments_info"] == segments
    dataset = ADE20KDataModule(root).make_dataset("train", None)
    assert dataset.names == ["a", "b", "c"]
    for sample in dataset:
        assert {s.class_id for s in sample.segments} <= {0, 2, 7, 12}
        assert not any(s.is_crowd for s in sample.segments)
        assert build_target(sample, "panoptic").labels.tolist() == [s.class_id for s in sample.segments]


def test_finished_images_are_not_made_again(root, capsys):
    assert call(root) == 0
    folder = root / "ade20k_panoptic_train"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    content = (root / "ade20k_panoptic_train.json").read_text()
    # As if it had been interrupted before the second image and the JSON, with a half-written file left.
    (root / "ade20k_panoptic_train.json").unlink()
    (folder / "b.png").unlink()
    (folder / ".b.png.123.tmp").write_bytes(b"half")
    capsys.readouterr()
    assert call(root, workers=2) == 0
    assert "3 images (1 made now, 2 had been made before)" in capsys.readouterr().out
    assert (folder / "a.png").stat().st_mtime_ns == before["a.png"]
    assert (folder / "b.png").stat().st_mtime_ns > before["b.png"]
    assert (root / "ade20k_panoptic_train.json").read_text() == content


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_to_the_group_leaves_whole_files_and_the_next_start_goes_on(root, name, monkeypatch, capfd):
    """It comes while a process is about to write the second image, and the first one is finished."""
    assert call(root) == 0
    expected = {path: path.read_bytes() for path in root.glob("ade20k_panoptic*/*")}
    for path in (*expected, *root.glob("*.json")):
        path.unlink()

    def write_and_signal(path, content):
        with replace_file(path) as file:
            file.write(content[: len(content) // 2])
            file.flush()
            if path.name == "b.png":
                signal_group(name)
            file.write(content[len(content) // 2 :])

    def prepare():
        with monkeypatch.context() as patch, stop_in_order():
            patch.setattr(prepare_ade20k, "write_file", write_and_signal)
            return call(root, workers=1)

    assert exit_code(in_group(prepare)) == 128 + signal.Signals[name]
    err = capfd.readouterr().err
    assert "interrupted: run the same command again to go on where it stopped" in err
    assert "Traceback" not in err
    left = list(root.glob("ade20k_panoptic*/*"))
    assert root / "ade20k_panoptic_train" / "a.png" in left
    assert all(path.read_bytes() == expected[path] for path in left)  # hidden ones included: nothing half-written
    assert not list(root.glob("*.json"))
    assert call(root, workers=1) == 0
    assert f"({3 - len(left)} made now, {len(left)} had been made before)" in capfd.readouterr().out
    assert {path: path.read_bytes() for path in root.glob("ade20k_panoptic*/*")} == expected


@pytest.mark.parametrize("damage", [b"\x89PNG\r\n", b"no image"])
def test_damaged_and_outdated_images_are_made_again(root, damage, capsys):
    prepare_split(root, "train")
    (root / "ade20k_panoptic_train" / "a.png").write_bytes(damage)
    write(root, "c", np.full((9, 7), SKY), instance_map(np.zeros((9, 7)), np.zeros((9, 7))))
    assert prepare_split(root, "train") == []
    assert "3 images (2 made now, 1 had been made before)" in capsys.readouterr().out
    assert (ADE20KDataModule(root).make_dataset("train", None)[2].panoptic == 1).all()


def test_a_broken_file_leaves_no_json(root, capsys):
    path = root / "annotations_instance" / "training" / "b.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert call(root) == 2
    printed = capsys.readouterr()
    for text in ("b.png", "annotations_instance.tar", "1 images of train could not be used"):
        assert text in printed.err
    assert not (root / "ade20k_panoptic_train.json").exists()
    assert (root / "ade20k_panoptic_val.json").exists()
    path.write_bytes(whole)
    assert call(root) == 0
    assert "3 images (1 made now, 2 had been made before)" in capsys.readouterr().out


def test_missing_files_are_one_line(root, capsys):
    (root / "annotations_instance" / "training" / "b.png").unlink()
    assert call(root) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("error: ")
    assert "b.jpg has no annotation" in err
    assert "\n" not in err
    with pytest.raises(UserError, match=r"images.training does not exist"):
        prepare_split(root / "nowhere", "train")
