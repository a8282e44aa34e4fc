"""Small data sets in the true form of each format; what is imported is read by the data sets themselves."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import math
import re

import numpy as np
import pytest
import yaml
from PIL import Image

from pem_lightning.data.coco_instances import CocoInstancesDataModule
from pem_lightning.data.semantic_folder import SemanticFolderDataset
from pem_lightning.tools import import_data
from pem_lightning.tools.import_data import main

HEIGHT, WIDTH = 20, 30
needs_datumaro = pytest.mark.skipif(
    importlib.util.find_spec("datumaro") is None, reason="needs requirements-import.txt"
)


def photo(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (9, 9, 9)).save(path)


def imported(source, kind, destination, *options):
    assert main([kind, str(source), str(destination), *options]) == 0
    datamodule = CocoInstancesDataModule(destination, "instance", batch_size=1)
    return {split: datamodule.make_dataset(split, None) for split in ("train", "val")}


def described(dataset):
    """Class name and pixels of every object, by image."""
    samples = {dataset.names[index]: dataset[index] for index in range(len(dataset))}
    return {
        name: [(dataset.info.class_names[s.class_id], int((sample.panoptic == s.id).sum())) for s in sample.segments]
        for name, sample in samples.items()
    }


def write_yolo(root, places=("images/train", "images/val"), **more):
    """As Ultralytics documents it: shares of width and height, one line an object."""
    for place in ("images/train", "images/val"):
        photo(root / place / "a.jpg")
        photo(root / place / "empty.jpg")
        label = (root / place.replace("images", "labels")) / "a.txt"
        label.parent.mkdir(parents=True)
        label.write_text("1 0.1 0.1 0.5 0.1 0.5 0.6 0.1 0.6\n0 0.6 0.5 0.9 0.5 0.9 0.9\n")
    config = {"path": "datasets/mine", "train": places[0], "val": places[1], "names": {0: "cat", 1: "dog"}, **more}
    (root / "data.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("places", [("images/train", "images/val"), ("../images/train", "../images/val")])
def test_yolo(tmp_path, capsys, places):
    write_yolo(tmp_path / "yolo", places)
    datasets = imported(tmp_path / "yolo", "yolo-seg", tmp_path / "out")
    for dataset in datasets.values():
        assert dataset.info.class_names == ("cat", "dog")
        objects = described(dataset)
        assert objects["empty"] == []
        (dog, pixels), (cat, some) = objects["a"]
        assert (dog, pixels, cat) == ("dog", 12 * 10, "cat")
        assert 25 <= some <= 47  # half of 9 x 8
    printed = capsys.readouterr().out
    assert "2 train, 2 val images with 2 classes: python train.py dataset=coco_instances task=instance" in printed


def test_yolo_lists_of_files_and_boxes(tmp_path, capsys):
    """As CVAT writes it: text files that list the images."""
    root = tmp_path / "yolo"
    write_yolo(root, ("train.txt", "val.txt"), path=".")
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(f"./images/{split}/a.jpg\n")
    with (root / "labels" / "train" / "a.txt").open("a") as file:
        file.write("1 0.5 0.5 0.1 0.1\n")
    datasets = imported(root, "yolo-seg", tmp_path / "out")
    assert len(datasets["train"][0].segments) == 2
    assert "left out: 1 boxes without outline" in capsys.readouterr().out


def shape(label, kind, points, **more):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


def write_labelme(path, shapes, size=(HEIGHT, WIDTH)):
    photo(path.with_suffix(".jpg"))
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": path.with_suffix(".jpg").name}
    path.write_text(json.dumps({**content, "imageData": None, "imageHeight": size[0], "imageWidth": size[1]}))


def test_labelme(tmp_path, capsys):
    Image.fromarray(np.eye(4, 3, dtype=np.uint8) * 255).save(png := io.BytesIO(), "PNG")
    shapes = [
        shape("dog", "polygon", [[2.0, 2.0], [12.0, 2.0], [12.0, 10.0], [2.0, 10.0]]),
        shape("cat", "rectangle", [[20.0, 8.0], [16.0, 2.0]]),
        shape("bee", "circle", [[25.0, 15.0], [28.0, 15.0]]),
        shape("bee", "mask", [[5, 14], [7, 17]], mask=base64.b64encode(png.getvalue()).decode()),
        shape("dog", "polygon", [[13, 12], [15, 12], [15, 14], [13, 14]], group_id=1),
        shape("dog", "polygon", [[17, 12], [19, 12], [19, 14], [17, 14]], group_id=1),
        shape("dog", "linestrip", [[1, 1], [2, 2]]),
    ]
    for place in ("train/a", "val/b"):
        (tmp_path / "labelme" / place).parent.mkdir(parents=True)
        write_labelme(tmp_path / "labelme" / f"{place}.json", shapes)
    datasets = imported(tmp_path / "labelme", "labelme", tmp_path / "out")
    objects = described(datasets["val"])["val_b"]
    assert objects[:2] + objects[3:] == [("dog", 80), ("cat", 24), ("bee", 3), ("dog", 8)]
    assert objects[2][1] == pytest.approx(math.pi * 9, abs=3)
    assert "left out: 2 shapes of the kind linestrip with 2 point(s)" in capsys.readouterr().out


def test_parts_are_made_where_there_are_none(tmp_path):
    (tmp_path / "labelme").mkdir()
    for index in range(10):
        shapes = [shape("dog", "polygon", [[2, 2], [12, 2], [12, 10]])] if index else []
        write_labelme(tmp_path / "labelme" / f"{index}.json", shapes)
    datasets = imported(tmp_path / "labelme", "labelme", tmp_path / "out", "--val=0.3")
    names = [set(dataset.names) for dataset in datasets.values()]
    assert [len(part) for part in names] == [7, 3]
    assert names[0] | names[1] == set(map(str, range(10)))


def test_semantic(tmp_path, capsys):
    """Later shapes lie on top of earlier ones."""
    shapes = [
        shape("dog", "rectangle", [[2, 2], [12, 10]]),
        shape("cat", "rectangle", [[4, 4], [6, 6]]),
    ]
    for place in ("train/a", "val/b"):
        (tmp_path / "labelme" / place).parent.mkdir(parents=True)
        write_labelme(tmp_path / "labelme" / f"{place}.json", shapes)
    assert main(["labelme", str(tmp_path / "labelme"), str(tmp_path / "out"), "--semantic"]) == 0
    dataset = SemanticFolderDataset(tmp_path / "out", "train")
    assert dataset.info.class_names == ("background", "cat", "dog")
    assert dataset[0].class_map().flatten().bincount().tolist() == [600 - 80, 4, 76]
    assert "dataset=semantic_folder" in capsys.readouterr().out


CVAT = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <{kind}>
      <id>1</id><name>pets</name>{subsets}
      <labels>
        <label><name>cat</name><color>#fa3253</color><type>any</type><attributes></attributes></label>
        <label><name>dog</name><color>#33ddff</color><type>any</type><attributes></attributes></label>
      </labels>
    </{kind}>
    <dumped>2024-01-01 00:00:00.000000+00:00</dumped>
  </meta>
  {images}
</annotations>
"""
CVAT_IMAGE = """
  <image id="{id}" name="{name}" {subset} width="30" height="20">
    <polygon label="dog" source="manual" occluded="0" points="2.00,2.00;12.00,2.00;12.00,10.00;2.00,10.00" z_order="0">
    </polygon>
    <mask label="cat" source="manual" occluded="0" rle="1, 3, 2, 2" left="20" top="5" width="4" height="2" z_order="0">
    </mask>
    <box label="dog" source="manual" occluded="0" xtl="1.00" ytl="1.00" xbr="4.00" ybr="5.00" z_order="0">
    </box>
  </image>
"""


@needs_datumaro
@pytest.mark.parametrize("is_project", [True, False])
def test_cvat(tmp_path, capsys, is_project):
    root = tmp_path / "cvat"
    images = ""
    for number, (name, subset) in enumerate([("a", "Train"), ("b", "Validation")]):
        photo(root / "images" / f"{name}.jpg")
        images += CVAT_IMAGE.format(id=number, name=f"{name}.jpg", subset=f'subset="{subset}"' if is_project else "")
    subsets = "<subsets><subset>Train</subset><subset>Validation</subset></subsets>" if is_project else ""
    xml = CVAT.format(kind="project" if is_project else "task", subsets=subsets, images=images)
    (root / "annotations.xml").write_text(xml)
    datasets = imported(root, "cvat", tmp_path / "out")
    assert datasets["val"].info.class_names == ("cat", "dog")
    objects = {**described(datasets["train"]), **described(datasets["val"])}
    assert objects == {name: [("dog", 80), ("cat", 5)] for name in "ab"}
    if is_project:
        assert datasets["train"].names == ["a"]
    mask = datasets["train"][0].panoptic[5:7, 20:24] > 0  # run lengths along the rows
    assert mask.tolist() == [[False, True, True, True], [False, False, True, True]]
    assert "left out: 2 annotations of the kind bbox" in capsys.readouterr().out


def voc_palette():
    """Pascal VOC's colour map: the bits of the index spread over red, green and blue."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3))
        for index in range(256)
        for channel in range(3)
    ]


def write_voc(root):
    classes, objects = np.zeros((2, HEIGHT, WIDTH), np.uint8)
    for number, (label, left) in enumerate([(15, 2), (15, 14), (8, 22)], start=1):
        classes[2:10, left : left + 6], objects[2:10, left : left + 6] = label, number
    classes[10, 2:8] = objects[10, 2:8] = 255
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, split in (("2007_000032", "train"), ("2007_000033", "val")):
        photo(root / "JPEGImages" / f"{name}.jpg")
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"{name}\n")
        for folder, values in (("SegmentationClass", classes), ("SegmentationObject", objects)):
            (root / folder).mkdir(exist_ok=True)
            picture = Image.fromarray(values).convert("P")
            picture.putpalette(voc_palette())
            picture.save(root / folder / f"{name}.png")


@needs_datumaro
def test_voc(tmp_path):
    write_voc(tmp_path / "VOC2012")
    dataset = imported(tmp_path / "VOC2012", "voc", tmp_path / "out")["val"]
    assert dataset.info.num_classes == 20
    assert sorted(described(dataset)["2007_000033"]) == [("cat", 48), ("person", 48), ("person", 48)]
    assert main(["voc", str(tmp_path / "VOC2012"), str(tmp_path / "semantic"), "--semantic"]) == 0
    dataset = SemanticFolderDataset(tmp_path / "semantic", "train")
    values = np.array(Image.open(dataset.files(0)[1]))
    assert {v: int((values == v).sum()) for v in np.unique(values).tolist()} == {0: 450, 8: 48, 15: 96, 255: 6}


# What is refused, with nothing left behind.


@needs_datumaro
@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("task", "../secret.jpg", "got: '../secret'"),
        ("task", "c.jpg", "c.jpg"),
        ("job", "a.jpg", "as cvat"),
    ],
)
def test_cvat_that_cannot_be_imported(tmp_path, capsys, kind, name, message):
    root = tmp_path / "cvat"
    for file in ("a.jpg", "../secret.jpg"):
        photo(root / "images" / file)
    images = CVAT_IMAGE.format(id=0, name="a.jpg", subset="") + CVAT_IMAGE.format(id=1, name=name, subset="")
    (root / "annotations.xml").write_text(CVAT.format(kind=kind, subsets="", images=images))
    assert main(["cvat", str(root), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["cvat"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "data.yaml").unlink(), "cannot read .*data.yaml"),
        (lambda root: (root / "data.yaml").write_text("train: images/train"), "no list of class names"),
        (lambda root: (root / "labels/val/a.txt").write_text("2 0 0 1 0 1 1"), r"a.txt, line 1, has the class '2'"),
        (lambda root: (root / "labels/val/a.txt").write_text("1 0 0 x 0 1 1"), "that are no numbers"),
        (lambda root: (root / "labels/val/a.txt").write_text("1 0 0 1 0 1 nan"), "none of an image"),
        (lambda root: (root / "labels/val/a.txt").write_text("1 0 0 9 0 9 9"), "in pixels, not as shares"),
        (lambda root: (root / "images/val/a.jpg").write_text("no image"), "cannot read the image"),
        (lambda root: [p.write_text("1 0 0 1 1") for p in root.rglob("*.txt")], "boxes are not enough"),
    ],
)
def test_one_line_and_nothing_left(tmp_path, capsys, spoil, message):
    write_yolo(tmp_path / "yolo")
    spoil(tmp_path / "yolo")
    assert main(["yolo-seg", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    write_yolo(tmp_path / "yolo")
    calls = []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(import_data.shutil, "copyfile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(["yolo-seg", str(tmp_path / "yolo"), str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["yolo"]


def test_the_destination(tmp_path, capsys):
    write_yolo(tmp_path / "yolo")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    assert main(["yolo-seg", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 2
    assert "exists and is not empty: give a new folder" in capsys.readouterr().err
    (tmp_path / "out" / "precious.txt").rename(tmp_path / "out" / ".DS_Store")  # which macOS puts into every folder
    assert main(["yolo-seg", str(tmp_path / "yolo"), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / ".DS_Store").exists()
    assert main(["yolo-seg", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2


def test_without_the_library(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(import_data.sys.modules, "datumaro", None)
    assert main(["voc", str(tmp_path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == (
        "error: this format is read by Datumaro: pip install -r requirements-import.txt\n"
    )
