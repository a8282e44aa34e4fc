from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from PIL import Image

from pem_lightning.data.dataset import distinct_color
from pem_lightning.data.semantic_folder import SemanticFolderDataModule, SemanticFolderDataset, read_classes
from pem_lightning.data.targets import build_target
from pem_lightning.types import Segment, UserError
from tests.data.damage import damages, outcome, save
from tests.data.test_coco import JUNK


def write(root, name, values, split="train", suffix="jpg", classes="[road, car, tree]"):
    """One image with its class map, and `classes.yaml`."""
    values = np.asarray(values)
    values = values if values.dtype == np.uint16 else values.astype(np.uint8)
    save(root / "images" / split / f"{name}.{suffix}", np.full((*values.shape, 3), 9, np.uint8))
    save(root / "labels" / split / f"{name}.png", values)
    (root / "classes.yaml").write_text(classes)


def classes_of(tmp_path, text):
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    return read_classes(path)


def test_values_are_positions(tmp_path):
    write(tmp_path, "a", [[0, 1, 2, 255, 0]])
    sample = SemanticFolderDataset(tmp_path, "train")[0]
    assert sample.panoptic.dtype == torch.int32
    assert sample.panoptic.tolist() == [[1, 2, 3, 0, 1]]
    assert sample.class_map().tolist() == [[0, 1, 2, 255, 0]]
    assert sample.segments == (Segment(1, 0, False), Segment(2, 1, False), Segment(3, 2, False))
    assert build_target(sample, "semantic").labels.tolist() == [0, 1, 2]


def test_ids_colors_and_void_of_the_file(tmp_path):
    classes = "classes: [{name: road, id: 7, color: [128, 64, 128]}, {name: car, id: 260}]\nvoid: [0, 255]"
    write(tmp_path, "a", np.array([[7, 260, 0], [255, 255, 7]], np.uint16), classes=classes)
    dataset = SemanticFolderDataset(tmp_path, "train")
    assert dataset.info.category_ids == (7, 260)
    assert dataset.info.colors.tolist() == [[128, 64, 128], list(distinct_color(1))]
    assert dataset[0].class_map().tolist() == [[0, 1, 255], [255, 255, 0]]


@pytest.mark.parametrize(("value", "classes"), [(255, []), (2, [2])])
def test_odd_empty_and_single_class_images(tmp_path, value, classes):
    write(tmp_path, "a", np.full((3, 5), value))
    assert [s.class_id for s in SemanticFolderDataset(tmp_path, "train")[0].segments] == classes


def test_palette_maps_are_read_by_index(tmp_path):
    write(tmp_path, "a", [[0, 1, 2]])
    picture = Image.fromarray(np.array([[2, 0, 255]], np.uint8), "P")
    picture.putpalette([value for index in range(256) for value in (index // 2, 255 - index, 7)])
    picture.save(tmp_path / "labels" / "train" / "a.png")
    assert SemanticFolderDataset(tmp_path, "train")[0].class_map().tolist() == [[2, 0, 255]]


def test_folders_may_be_nested(tmp_path):
    write(tmp_path, "city/b", [[0]])
    write(tmp_path, "a", [[1]], suffix="PNG")
    dataset = SemanticFolderDataset(tmp_path, "train")
    assert dataset.names == ["a", "city_b"]
    assert [path.name for path in dataset.files(1)] == ["b.jpg", "b.png"]


@pytest.mark.parametrize("value", [3, 17, 254])
def test_unknown_values_are_named(tmp_path, value):
    write(tmp_path, "a", [[0, value, 255]])
    with pytest.raises(
        UserError, match=rf"a\.png has the value {value}, which is neither a class nor void: .*classes\.yaml"
    ):
        SemanticFolderDataset(tmp_path, "train")[0]


def test_unpaired_and_ambiguous_files(tmp_path):
    write(tmp_path, "a", [[0]])
    write(tmp_path, "b", [[0]])
    (tmp_path / "labels" / "train" / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.jpg has no annotation: .* same names but for the suffix"):
        SemanticFolderDataset(tmp_path, "train")
    assert SemanticFolderDataset(tmp_path, "train", on_error="skip").names == ["a"]
    (tmp_path / "images" / "train" / "b.jpg").rename(tmp_path / "images" / "train" / "a.bmp")
    with pytest.raises(UserError, match=r"a\.jpg has the same name as .*a\.bmp"):
        SemanticFolderDataset(tmp_path, "train")


def test_missing_folders(tmp_path):
    with pytest.raises(UserError, match=r"classes\.yaml does not exist: expected are root/classes\.yaml"):
        SemanticFolderDataModule(tmp_path)
    write(tmp_path, "a", [[0]])
    with pytest.raises(UserError, match=r"images.val does not exist"):
        SemanticFolderDataset(tmp_path, "val")
    (tmp_path / "images" / "val").mkdir()
    with pytest.raises(UserError, match=r"images.val has no files that end in .*\.jpg"):
        SemanticFolderDataset(tmp_path, "val")


@pytest.mark.parametrize("text", ["[road, car]", "- road\n- name: car", "classes: [road, {name: car, id: 1}]"])
def test_ways_to_write_classes(tmp_path, text):
    info, void = classes_of(tmp_path, text)
    assert info.class_names == ("road", "car")
    assert info.category_ids == (0, 1)
    assert info.thing_classes == frozenset()
    assert void == {255}
    assert classes_of(tmp_path, "[{name: road, id: 255}]")[1] == frozenset()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no list of classes"),
        ("road", "no list of classes"),
        ("[", "cannot read"),
        ("names: [road]", "no list of classes"),
        ("classes: {road: 1}", "no list of classes"),
        ("[]", "0 classes"),
        ("[1, 2]", "class 0 has no name: .* in quotes"),
        (
            "[no, crack]",
            "class 0 has no name: YAML reads no, off, yes and on as false or true, so put",
        ),
        ("[crack, {name: on}]", "class 1 has no name: YAML reads"),
        ("[road, road]", "class name road twice"),
        ("[road, {name: car, id: 0}]", "class id 0 twice"),
        ("[{name: road, colour: [1, 2, 3]}]", "has the key 'colour': known are color, id, name"),
        ("[{name: road, color: red}]", "has the color 'red'"),
        ("[{name: road, color: [1, 2, 256]}]", "has the color"),
        ("[{name: road, id: -1}]", "has the id -1"),
        ("[{name: road, id: 65536}]", "has the id 65536: values of a map are at most 65535"),
        ("{classes: [road], void: 255}", "void must be a list"),
        ("{classes: [road], void: [-1]}", "void must be a list"),
        ("{classes: [road], void: [0]}", "the value 0 is both void and a class"),
    ],
)
def test_wrong_class_lists_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        classes_of(tmp_path, text)
    assert "classes.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=5000)
@given(damages | JUNK.map(lambda junk: lambda data: json.dumps(junk).encode(errors="surrogatepass")))
def test_damaged_class_list(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "classes.yaml"
    path.write_bytes(damage(b"classes:\n- road\n- {name: field, color: [0, 255, 0], id: 3}\nvoid: [255]\n"))
    classes, message = outcome(read_classes, path)
    if message:
        assert str(path) in message
    else:
        info, void = classes
        assert 1 <= info.num_classes <= 255
        assert not void & set(info.category_ids)


def test_data_module(tmp_path):
    for split in ("train", "val"):
        write(tmp_path, "a", np.ones((20, 30)), split)
    data = SemanticFolderDataModule(tmp_path, batch_size=1, num_workers=0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch.images[0].shape == (3, 640, 640)
    assert batch.targets[0].labels.tolist() == [1]
    assert data.info.num_classes == 3
    with pytest.raises(UserError, match=r"no task=panoptic: choose task=semantic"):
        SemanticFolderDataModule(tmp_path, "panoptic")
