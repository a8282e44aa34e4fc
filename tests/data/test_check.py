"""Faults planted into small trees of the true formats: each is found, and its message names file and cure."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pem_lightning.data.ade20k import ADE20KDataset
from pem_lightning.data.check import check_split, shifted_by_one
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataset
from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.semantic_folder import SemanticFolderDataset
from pem_lightning.files import id_to_rgb


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def photo(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


class Tree:
    """Two images of a data set with all its classes, and what is needed to plant a fault."""

    names = ("a", "b")

    def __init__(self, root):
        self.root = root
        for name in self.names:
            save(self.image(name), photo(*self.values.shape[:2]))
            save(self.label(name), self.values)

    def check(self):
        return check_split(self.dataset(), "train")

    def problem(self):
        """The one problem that there is."""
        (problem,) = self.check().problems
        assert "\n" not in problem
        return problem


class Cityscapes(Tree):
    values = np.array([[k if k < 24 else 1000 * k for k in CITYSCAPES.category_ids] + [0, 24]], np.uint16).repeat(4, 0)

    def image(self, name):
        return self.root / "leftImg8bit" / "train" / "ulm" / f"ulm_{name}_leftImg8bit.png"

    def label(self, name):
        return self.root / "gtFine" / "train" / "ulm" / f"ulm_{name}_gtFine_instanceIds.png"

    def dataset(self):
        return CityscapesDataset(self.root, "train", on_error="collect")


class ADE20K(Tree):
    values = np.arange(151, dtype=np.uint8)[None].repeat(3, 0)

    def image(self, name):
        return self.root / "images" / "training" / f"{name}.jpg"

    def label(self, name):
        return self.root / "annotations" / "training" / f"{name}.png"

    def dataset(self):
        return ADE20KDataset(self.root, "train", on_error="collect")


class Folder(Tree):
    values = np.array([[0, 1, 2, 255]], np.uint8).repeat(3, 0)

    def __init__(self, root, classes="[road, field, wood]"):
        super().__init__(root)
        (root / "classes.yaml").write_text(classes)

    def image(self, name):
        return self.root / "images" / "train" / f"{name}.jpg"

    def label(self, name):
        return self.root / "labels" / "train" / f"{name}.png"

    def dataset(self):
        return SemanticFolderDataset(self.root, "train", on_error="collect")


class Coco(Tree):
    values = id_to_rgb(np.array([[0, 5, 5, 70000]], np.int32).repeat(3, 0))

    def __init__(self, root):
        super().__init__(root)
        self.content = {
            "images": [{"id": k, "file_name": f"{name}.jpg"} for k, name in enumerate(self.names)],
            "annotations": [
                {
                    "image_id": k,
                    "file_name": f"{name}.png",
                    "segments_info": [
                        {"id": 5, "category_id": 1, "iscrowd": 0},
                        {"id": 70000, "category_id": 9, "iscrowd": 0},
                    ],
                }
                for k, name in enumerate(self.names)
            ],
            "categories": [
                {"id": 1, "name": "cat", "isthing": 1, "color": [9, 9, 9]},
                {"id": 9, "name": "sky", "isthing": 0, "color": [0, 0, 255]},
            ],
        }

    def image(self, name):
        return self.root / "images" / f"{name}.jpg"

    def label(self, name):
        return self.root / "maps" / f"{name}.png"

    def dataset(self):
        (self.root / "maps.json").write_text(json.dumps(self.content))
        return CocoPanopticDataset(self.root / "maps.json", self.root / "images", on_error="collect")


@pytest.mark.parametrize("kind", [Cityscapes, ADE20K, Folder, Coco])
def test_a_sound_tree_has_no_problem(kind, tmp_path):
    result = kind(tmp_path).check()
    assert result.problems == result.notes == []
    assert result.images == 2
    assert set(result.images_with.values()) == {2}
    assert result.gallery == [0, 1]


def test_counts_per_class(tmp_path):
    result = Coco(tmp_path).check()
    assert (result.pixels, result.segments, result.total_pixels) == ({0: 12, 1: 6}, {0: 2, 1: 2}, 24)
    report = result.to_dict()
    assert report["void_share"] == 0.25
    assert report["classes"][0] == {
        "name": "cat",
        "pixels": 12,
        "share": 0.5,
        "segments": 2,
        "crowds": 0,
        "images": 2,
    }


# The planted faults.


def test_fault_missing_annotation(tmp_path):
    tree = Cityscapes(tmp_path)
    tree.label("b").unlink()
    problem = tree.problem()
    assert problem.startswith(f"{tree.image('b')} has no annotation: ")
    assert "gtFine_trainvaltest.zip" in problem


def test_fault_missing_image(tmp_path):
    tree = ADE20K(tmp_path)
    tree.image("a").unlink()
    problem = tree.problem()
    assert problem.startswith(f"{tree.label('a')} has no image: ")
    assert "ADEChallengeData2016.zip" in problem


@pytest.mark.parametrize("kind", [Cityscapes, ADE20K])
def test_fault_truncated_image(kind, tmp_path):
    tree = kind(tmp_path)
    path = tree.image("b")
    path.write_bytes(path.read_bytes()[:-20])
    assert tree.problem().startswith(f"cannot read {path} (it is truncated): ")


def test_fault_damaged_map(tmp_path):
    tree = Cityscapes(tmp_path)
    path = tree.label("a")
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    path.write_bytes(data)
    assert tree.problem().startswith(f"cannot read {path} (its content is damaged: a checksum is wrong): ")


def test_fault_wrong_size(tmp_path):
    tree = Folder(tmp_path)
    save(tree.label("a"), tree.values.T.copy())
    problem = tree.problem()
    assert problem.startswith(str(tree.label("a")))
    assert "3x4" in problem
    assert "4x3" in problem


def test_fault_wrong_mode(tmp_path):
    """Colours where ids are expected."""
    tree = Folder(tmp_path)
    save(tree.label("b"), photo(3, 4))
    problem = tree.problem()
    assert problem.startswith(str(tree.label("b")))
    assert "channel" in problem


def test_fault_lossy_map(tmp_path):
    tree = Folder(tmp_path)
    Image.fromarray(tree.values).save(tree.label("b"), "JPEG")
    assert tree.problem().startswith(f"{tree.label('b')} is no PNG file")


def test_fault_unknown_id(tmp_path):
    tree = Cityscapes(tmp_path)
    save(tree.label("b"), np.where(tree.values == 7, 77, tree.values).astype(np.uint16))
    problem = tree.problem()
    assert problem.startswith(str(tree.label("b")))
    assert "77" in problem


def test_fault_id_without_entry(tmp_path):
    tree = Coco(tmp_path)
    del tree.content["annotations"][1]["segments_info"][0]
    problem = tree.problem()
    assert problem.startswith(str(tree.label("b")))
    assert "id 5" in problem


def test_fault_ade20k_shifted_down_by_one(tmp_path):
    """What subtracting one from bytes beforehand makes of void: 255."""
    tree = ADE20K(tmp_path)
    for name in tree.names:
        save(tree.label(name), tree.values - np.uint8(1))
    suspicion, *rest = tree.check().problems
    assert "shifted down by one" in suspicion
    assert "255 covers 0.7% of all pixels" in suspicion
    assert "150 never occurs" in suspicion
    assert [problem.split(" ")[0] for problem in rest] == [str(tree.label("a")), str(tree.label("b"))]


def test_fault_folder_shifted_up_by_one(tmp_path):
    tree = Folder(tmp_path)
    for name in tree.names:
        save(tree.label(name), np.array([[1, 2, 3, 255]], np.uint8).repeat(3, 0))
    suspicion = tree.check().problems[0]
    assert "shifted up by one" in suspicion
    assert "3 covers 25.0% of all pixels" in suspicion
    assert "0 never occurs" in suspicion
    assert "classes.yaml" in suspicion


@pytest.mark.parametrize("with_void", [True, False])
def test_fault_cityscapes_train_ids(with_void, tmp_path):
    tree = Cityscapes(tmp_path)
    for name in tree.names:
        save(tree.label(name), np.array([[*range(19), 255 if with_void else 0, 0]], np.uint8).repeat(4, 0))
    suspicion = tree.check().problems[0]
    assert "train ids instead of instanceIds" in suspicion
    assert "gtFine_instanceIds.png" in suspicion


def test_fault_cityscapes_label_ids(tmp_path):
    tree = Cityscapes(tmp_path)
    for name in tree.names:
        save(tree.label(name), np.array([[*CITYSCAPES.category_ids, 0, 0]], np.uint8).repeat(4, 0))
    assert "labelIds instead of instanceIds" in tree.problem()


def test_fault_class_that_never_occurs(tmp_path):
    tree = Folder(tmp_path)
    for name in tree.names:
        save(tree.label(name), np.zeros((3, 4), np.uint8))
    problem = tree.problem()
    assert problem.startswith(f"train ({tmp_path}/labels/train): 2 of 3 classes never occur: field, wood; ")
    (note,) = check_split(tree.dataset(), "val").notes  # validation may lack some
    assert note.startswith(f"val ({tmp_path}/labels/train): 2 of 3 classes never occur")


def test_fault_overlapping_ids(tmp_path):
    tree = Coco(tmp_path)
    tree.content["annotations"][0]["segments_info"].append({"id": 5, "category_id": 9, "iscrowd": 0})
    problem = tree.problem()
    assert "maps.json" in problem
    assert "a.jpg has the segment id 5 twice" in problem


def test_fault_segment_without_pixels(tmp_path):
    tree = Coco(tmp_path)
    tree.content["annotations"][1]["segments_info"].append({"id": 6, "category_id": 9, "iscrowd": 0})
    assert tree.problem().startswith(
        f"{tree.label('b')} has no pixels for 1 of its 3 listed segments, number 3 (sky): "
    )


def test_images_without_annotation_are_noted(tmp_path):
    tree = Folder(tmp_path)
    save(tree.label("b"), np.full((3, 4), 255, np.uint8))
    result = tree.check()
    assert result.problems == []
    assert result.notes == [f"train ({tmp_path}/labels/train): 1 image(s) have no annotated pixel: b"]


@pytest.mark.parametrize("void", ["[255]", "[3, 255]", "[]"])
def test_declared_void_is_no_shift(void, tmp_path):
    """Values that the format defines give no suspicion, whatever is missing beside them."""
    tree = Folder(tmp_path, f"{{classes: [road, field, wood], void: {void}}}")
    for name in tree.names:
        save(tree.label(name), np.array([[1, 1, 2, 3 if "3" in void else 1]], np.uint8).repeat(3, 0))
    assert not any("shifted" in problem for problem in tree.check().problems)


def test_a_value_of_its_own_gives_no_suspicion():
    assert shifted_by_one(Counter({0: 5, 1: 5, 7: 1}), range(3), "cure") == []
    assert shifted_by_one(Counter({0: 5, 2: 5, 3: 1}), range(3), "cure") == []  # 3 is unknown, but 0 is used
    assert shifted_by_one(Counter({2: 5, 255: 5}), range(3), "cure") == []  # 255 is unknown, but the highest is used


def test_nothing_but_orphans(tmp_path):
    tree = ADE20K(tmp_path)
    for name in tree.names:
        tree.label(name).rename(tree.label(f"other_{name}"))
    result = tree.check()
    assert len(result.problems) == 4
    assert (result.images, result.gallery) == (0, [])
