"""Faults planted into small trees of the true formats: each is found, and its message names file and cure."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from pem_lightning.data.ade20k import ADE20KDataset
from pem_lightning.data.check import check_split, shifted_by_one
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataset
from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.semantic_folder import SemanticFolderDataset
from pem_lightning.files import id_to_rgb
from tests.data.damage import save
from tests.panoptic_files import segment


def photo(height, width):
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


class Tree:
    """Two images of a data set with all its classes, and what is needed to plant a fault."""

    names = ("a", "b")
    image_path, label_path = "images/train/{}.png", "labels/train/{}.png"

    def __init__(self, root):
        self.root = root
        for name in self.names:
            save(self.image(name), photo(*self.values.shape[:2]))
            save(self.label(name), self.values)

    def image(self, name):
        return self.root / self.image_path.format(name)

    def label(self, name):
        return self.root / self.label_path.format(name)

    def relabel(self, values, names=names):
        for name in names:
            save(self.label(name), values)

    def check(self, split="train"):
        return check_split(self.dataset(), split)

    def problem(self):
        """The one problem that there is."""
        (problem,) = self.check().problems
        assert "\n" not in problem
        return problem


class Cityscapes(Tree):
    values = np.array([[k if k < 24 else 1000 * k for k in CITYSCAPES.category_ids] + [0, 24]], np.uint16).repeat(4, 0)
    image_path = "leftImg8bit/train/ulm/ulm_{}_leftImg8bit.png"
    label_path = "gtFine/train/ulm/ulm_{}_gtFine_instanceIds.png"

    def dataset(self):
        return CityscapesDataset(self.root, "train", on_error="collect")


class ADE20K(Tree):
    values = np.arange(151, dtype=np.uint8)[None].repeat(3, 0)
    image_path, label_path = "images/training/{}.jpg", "annotations/training/{}.png"

    def dataset(self):
        return ADE20KDataset(self.root, "train", on_error="collect")


class Folder(Tree):
    values = np.array([[0, 1, 2, 255]], np.uint8).repeat(3, 0)

    def __init__(self, root, classes="[road, field, wood]"):
        super().__init__(root)
        (root / "classes.yaml").write_text(classes)

    def dataset(self):
        return SemanticFolderDataset(self.root, "train", on_error="collect")


class Coco(Tree):
    values = id_to_rgb(np.array([[0, 5, 5, 70000]], np.int32).repeat(3, 0))
    image_path, label_path = "images/{}.png", "maps/{}.png"

    def __init__(self, root):
        super().__init__(root)
        self.listed = {name: [segment(5, 1), segment(70000, 9)] for name in self.names}

    def dataset(self):
        content = {
            "images": [{"id": name, "file_name": f"{name}.png"} for name in self.names],
            "annotations": [{"image_id": name, "segments_info": self.listed[name]} for name in self.names],
            "categories": [{"id": 1, "name": "cat", "isthing": 1}, {"id": 9, "name": "sky", "isthing": 0}],
        }
        (self.root / "maps.json").write_text(json.dumps(content))
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
    cat = {"name": "cat", "pixels": 12, "share": 0.5, "segments": 2, "crowds": 0, "images": 2}
    assert report["classes"][0] == cat


# The planted faults.


def test_missing_counterparts(tmp_path):
    tree = Cityscapes(tmp_path / "cityscapes")
    tree.label("b").unlink()
    problem = tree.problem()
    assert problem.startswith(f"{tree.image('b')} has no annotation: ")
    assert "gtFine_trainvaltest.zip" in problem
    tree = ADE20K(tmp_path / "ade20k")
    tree.image("a").unlink()
    problem = tree.problem()
    assert problem.startswith(f"{tree.label('a')} has no image: ")
    assert "ADEChallengeData2016.zip" in problem
    tree.label("b").rename(tree.label("other"))
    result = tree.check()
    assert (len(result.problems), result.images, result.gallery) == (3, 0, [])


@pytest.mark.parametrize("kind", [Cityscapes, ADE20K])
def test_truncated_image_and_damaged_map(kind, tmp_path):
    tree = kind(tmp_path)
    image, label = tree.image("b"), tree.label("a")
    image.write_bytes(image.read_bytes()[:-20])
    data = bytearray(label.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 1
    label.write_bytes(data)
    first, second, *_ = sorted(problem for problem in tree.check().problems if problem.startswith("cannot read"))
    for path, fault in ((label, "its content is damaged: a checksum is wrong"), (image, "it is truncated")):
        assert any(problem.startswith(f"cannot read {path} ({fault}): ") for problem in (first, second))


@pytest.mark.parametrize(
    ("values", "message"),
    [(Folder.values.T.copy(), "is a 3x4 map of 1 channel(s), its image b.png needs a 4x3"), (photo(3, 4), "3 channel")],
)
def test_wrong_size_or_mode(tmp_path, values, message):
    tree = Folder(tmp_path)
    tree.relabel(values, "b")
    problem = tree.problem()
    assert problem.startswith(str(tree.label("b")))
    assert message in problem


def test_unknown_ids(tmp_path):
    tree = Cityscapes(tmp_path / "cityscapes")
    tree.relabel(np.where(tree.values == 7, 77, tree.values).astype(np.uint16), "b")
    assert tree.problem().startswith(f"{tree.label('b')} has ids that Cityscapes does not define (77)")
    tree = Coco(tmp_path / "coco")
    del tree.listed["b"][0]
    assert tree.problem().startswith(f"{tree.label('b')} has the segment id 5")


def test_ade20k_shifted_down_by_one(tmp_path):
    """What subtracting one from bytes beforehand makes of void: 255."""
    tree = ADE20K(tmp_path)
    tree.relabel(tree.values - np.uint8(1))
    suspicion, *rest = tree.check().problems
    assert "shifted down by one" in suspicion
    assert "255 covers 0.7% of all pixels" in suspicion
    assert "150 never occurs" in suspicion
    assert [problem.split(" ")[0] for problem in rest] == [str(tree.label("a")), str(tree.label("b"))]


def test_folder_shifted_up_by_one(tmp_path):
    tree = Folder(tmp_path)
    tree.relabel(np.array([[1, 2, 3, 255]], np.uint8).repeat(3, 0))
    suspicion = tree.check().problems[0]
    for evidence in ("shifted up by one", "3 covers 25.0% of all pixels", "0 never occurs", "classes.yaml"):
        assert evidence in suspicion


@pytest.mark.parametrize("void", ["[255]", "[3, 255]", "[]"])
def test_declared_void_is_no_shift(void, tmp_path):
    """Values that the format defines give no suspicion, whatever is missing beside them."""
    tree = Folder(tmp_path, f"{{classes: [road, field, wood], void: {void}}}")
    tree.relabel(np.array([[1, 1, 2, 3 if "3" in void else 1]], np.uint8).repeat(3, 0))
    assert not any("shifted" in problem for problem in tree.check().problems)


def test_a_value_of_its_own_gives_no_suspicion():
    assert shifted_by_one(Counter({0: 5, 1: 5, 7: 1}), range(3), "hint") == []
    assert shifted_by_one(Counter({0: 5, 2: 5, 3: 1}), range(3), "hint") == []  # 3 is unknown, but 0 is used
    assert shifted_by_one(Counter({2: 5, 255: 5}), range(3), "hint") == []  # 255 is unknown, but the highest is used


@pytest.mark.parametrize("void", [255, 0])
def test_cityscapes_train_ids(void, tmp_path):
    tree = Cityscapes(tmp_path)
    tree.relabel(np.array([[*range(19), void, 0]], np.uint8).repeat(4, 0))
    suspicion = tree.check().problems[0]
    assert "train ids instead of instanceIds" in suspicion
    assert "gtFine_instanceIds.png" in suspicion


def test_cityscapes_label_ids(tmp_path):
    tree = Cityscapes(tmp_path)
    tree.relabel(np.array([[*CITYSCAPES.category_ids, 0, 0]], np.uint8).repeat(4, 0))
    assert "labelIds instead of instanceIds" in tree.problem()


def test_class_that_never_occurs(tmp_path):
    tree = Folder(tmp_path)
    tree.relabel(np.zeros((3, 4), np.uint8))
    assert tree.problem().startswith(f"train ({tmp_path}/labels/train): 2 of 3 classes never occur: field, wood; ")
    (note,) = tree.check("val").notes  # validation may lack some
    assert note.startswith(f"val ({tmp_path}/labels/train): 2 of 3 classes never occur")


def test_segments_that_do_not_fit_the_map(tmp_path):
    tree = Coco(tmp_path)
    tree.listed["a"].append(segment(5, 9))
    problem = tree.problem()
    assert "maps.json" in problem
    assert "a.png has the segment id 5 twice" in problem
    tree.listed["a"][-1]["id"] = 6
    assert tree.problem().startswith(
        f"{tree.label('a')} has no pixels for 1 of its 3 listed segments, number 3 (sky): "
    )


def test_images_without_annotation_are_noted(tmp_path):
    tree = Folder(tmp_path)
    tree.relabel(np.full((3, 4), 255, np.uint8), "b")
    result = tree.check()
    assert result.problems == []
    assert result.notes == [f"train ({tmp_path}/labels/train): 1 image(s) have no annotated pixel: b"]
