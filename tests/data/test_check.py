"""Faults planted into small trees of the true formats: each is found, and its message names file and cure."""

from __future__ import annotations

import json
import logging
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from pem_lightning.data import check
from pem_lightning.data.ade20k import ADE20KDataset
from pem_lightning.data.check import check_before_training, check_split, shifted_by_one
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataset
from pem_lightning.data.coco import CocoPanopticDataset
from pem_lightning.data.semantic_folder import SemanticFolderDataModule, SemanticFolderDataset
from pem_lightning.files import id_to_rgb
from pem_lightning.types import UserError
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


# Trainings that would be wrong without a word.


def semantic(tree):
    return check_split(tree.dataset(), "train", task="semantic")


@pytest.mark.parametrize(
    ("classes", "values", "reason"),
    [
        ("[background, crack]", [0, 255], "every annotated pixel is background"),
        (
            "[crack]",
            [0, 255],
            "crack is the only class, and with one class every pixel is that class",
        ),
        ("{classes: [{name: crack, id: 7}], void: [0]}", [0, 7], "add a background class"),
        ("[background, crack]", [0, 0], "every annotated pixel is background"),
        ("{classes: [{name: background, id: 1}, {name: crack, id: 2}], void: [0]}", [0, 0], "nothing is annotated"),
    ],
)
def test_data_that_leave_nothing_to_learn(tmp_path, classes, values, reason):
    tree = Folder(tmp_path, classes)
    tree.relabel(np.array([values * 2], np.uint8).repeat(3, 0))
    result = semantic(tree)
    assert reason in result.pointless
    assert result.pointless in result.problems


def test_masks_of_0_and_255(tmp_path):
    tree = Folder(tmp_path, "[background, crack]")
    tree.relabel(np.array([[0, 0, 0, 255]], np.uint8).repeat(3, 0))
    fix = "255 covers 25.0% of all pixels, and is void: if it means crack, write {name: crack, id: 255} in classes.yaml"
    assert tree.problem().endswith(fix)
    (tmp_path / "classes.yaml").write_text("[background, {name: crack, id: 255}]")
    result = semantic(tree)
    assert (result.pointless, result.problems, result.notes) == ("", [], [])


def test_one_countable_class_can_be_learnt(tmp_path):
    """Its instances have to be told apart, and stuff is none of them."""
    tree = Coco(tmp_path)
    things = check_split(tree.dataset(), "train", task="instance")
    assert things.pointless == ""
    tree.listed = {name: [segment(5, 9), segment(70000, 9)] for name in tree.names}
    assert "task=instance learns no other" in check_split(tree.dataset(), "train", task="instance").pointless
    tree.listed = {name: [segment(5, 1), segment(70000, 1)] for name in tree.names}
    assert check_split(tree.dataset(), "train").pointless == ""
    assert "every annotated pixel is cat" in semantic(tree).pointless


def turn(tree, orientation, suffix="jpg", size=None):
    """Write the images anew with an EXIF orientation, and their maps in the stored pixels' order."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    for name in tree.names:
        values = tree.values if size is None else np.zeros(size, np.uint8)
        tree.image(name).unlink()
        Image.fromarray(photo(*values.shape)).save(tree.image(name).with_suffix(f".{suffix}"), exif=exif)
        values.flat[:3] = 0, 1, 2
        tree.relabel(values, name)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(("orientation", "size"), [(3, None), (2, (5, 9)), (6, (7, 7))])
def test_exif_orientation_that_no_size_gives_away(tmp_path, suffix, orientation, size):
    tree = Folder(tmp_path)
    turn(tree, orientation, suffix, size)
    result = tree.check()
    (note,) = result.notes
    assert note.startswith(f"train ({tmp_path}/labels/train): 2 image(s) are turned upright by their EXIF orientation")
    assert note.endswith("remove that tag from the images (exiftool -Orientation=): a, b")
    assert result.problems == []


def test_exif_orientation_that_does_not_fit(tmp_path):
    tree = Folder(tmp_path)
    turn(tree, 6)
    reason = "by its EXIF orientation (6), the map is not: turn the map in the same way, or remove that tag"
    for name, problem in zip(tree.names, tree.check().problems[:2], strict=True):
        assert problem.startswith(f"{tree.label(name)} is a 4x3 map of 1 channel(s), its image {name}.jpg needs a 3x4")
        assert reason in problem
    for name in tree.names:  # which is right
        tree.relabel(np.rot90(tree.values, -1).copy(), name)
    assert tree.check().notes == []


def test_more_segments_than_queries(tmp_path):
    result = check_split(Folder(tmp_path).dataset(), "train", task="semantic", num_queries=2)
    (note,) = result.notes
    assert "2 image(s) have more segments than num_queries=2, up to 3 (a), and a query finds one" in note
    assert check_split(Folder(tmp_path).dataset(), "train", task="semantic", num_queries=3).notes == []


# The check that a training makes.


@pytest.fixture
def datamodule(tmp_path, monkeypatch):
    """Of 200 pictures, of which every second one has both classes; read without hurry."""
    monkeypatch.setattr(check, "SAMPLE", {"train": (64, 1000.0), "val": (16, 1000.0)})
    for split in ("train", "val"):
        for index in range(200):
            save(tmp_path / "images" / split / f"{index:03d}.png", photo(4, 6))
            save(tmp_path / "labels" / split / f"{index:03d}.png", np.eye(4, 6, dtype=np.uint8) * (index % 2))
    (tmp_path / "classes.yaml").write_text("[road, field]")
    return SemanticFolderDataModule(tmp_path, batch_size=1)


def test_a_training_reads_a_sample_of_both_splits(datamodule, monkeypatch):
    read, item = [], check._check_item

    def watched(dataset, index, task):
        read.append(index)
        return item(dataset, index, task)

    monkeypatch.setattr(check, "_check_item", watched)
    check_before_training(datamodule, True, 10)
    assert len(read) == 64 + 16
    assert len(set(read[:64])) == 64
    for start in (read[:64], read[:16], read[:8], read[64:]):  # wherever the time was up
        quarters = Counter(index // 50 for index in start)
        assert len(quarters) == 4
    again = list(read)
    read.clear()
    check_before_training(datamodule, True, 10)
    assert read == again
    monkeypatch.setattr(check, "SAMPLE", {"train": (64, 0.0), "val": (16, 0.0)})
    read.clear()
    check_before_training(datamodule, True, 10)
    assert read == [0, 0]


@pytest.mark.parametrize("how", [True, "full"])
def test_a_check_draws_no_random_numbers(datamodule, how):
    torch.manual_seed(0)
    np.random.seed(0)
    before, position = torch.get_rng_state(), np.random.get_state()[2]  # Python's moves: beartype draws from it
    datamodule.num_workers = 0
    check_before_training(datamodule, how, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[2] == position


def test_what_stops_a_training_and_what_is_said(datamodule, tmp_path, caplog):
    check_before_training(datamodule, True, 1)
    (train, val) = caplog.messages
    assert "64 of 200 images read): 32 image(s) have more segments than num_queries=1, up to 2" in train
    assert val.startswith("val (")
    broken = tmp_path / "labels" / "val" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cannot read .*val/000.png .it is truncated"):
        check_before_training(datamodule, True, 10)
    datamodule.on_error = "skip"
    caplog.clear()
    check_before_training(datamodule, True, 10)
    assert "cannot read" in caplog.text
    (tmp_path / "classes.yaml").write_text("[road, field, wood]")
    rare = SemanticFolderDataModule(tmp_path, batch_size=1, on_error="skip")
    with caplog.at_level(logging.INFO):
        check_before_training(rare, True, 10)
    assert "1 of 3 classes do not occur in 64 of 200 training images" in caplog.text
    caplog.clear()
    rare.num_workers = 0
    check_before_training(rare, "full", 10)
    assert "1 of 3 classes never occur: wood; no model can learn them" in caplog.text
    with pytest.raises(UserError, match=r"dataset\.check=maybe: choose true, false or full"):
        check_before_training(rare, "maybe", 10)
