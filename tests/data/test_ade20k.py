from __future__ import annotations

import numpy as np
import pytest
import torch

from pem_lightning.data.ade20k import ADE20K, ADE20K_PANOPTIC, ADE20KDataModule, ADE20KDataset
from pem_lightning.data.targets import build_target
from pem_lightning.types import Segment, UserError
from tests.data.damage import save


def write(root, name, semantic, split="training"):
    image = np.random.default_rng(0).integers(0, 256, (*semantic.shape, 3), np.uint8)
    save(root / "images" / split / f"{name}.jpg", image)
    save(root / "annotations" / split / f"{name}.png", semantic)


def test_classes_are_the_official_ones():
    assert ADE20K.num_classes == 150
    assert len(ADE20K.thing_classes) == 100
    assert ADE20K.class_names[:7] == ("wall", "building", "sky", "floor", "tree", "ceiling", "road, route")
    assert ADE20K.class_names[-1] == "flag"
    assert {0, 2, 9}.isdisjoint(ADE20K.thing_classes)
    assert {7, 12, 149} <= ADE20K.thing_classes
    assert ADE20K.colors[[0, 12, 149]].tolist() == [[120, 120, 120], [150, 5, 61], [92, 0, 255]]
    assert ADE20K.category_ids == tuple(range(1, 151))
    assert ADE20K_PANOPTIC.category_ids == tuple(range(150))
    assert ADE20K_PANOPTIC.class_names == ADE20K.class_names


def test_every_value_becomes_its_class(tmp_path):
    """0 is void and 1 to 150 are the classes 0 to 149, at an odd size."""
    values = np.arange(151, dtype=np.uint8).reshape(1, 151).repeat(3, 0)
    write(tmp_path, "ADE_train_00000001", values)
    sample = ADE20KDataset(tmp_path, "train")[0]
    assert sample.name == "ADE_train_00000001"
    assert sample.image.shape == (3, 3, 151)
    assert sample.panoptic.dtype == torch.int32
    assert sample.class_map()[0].tolist() == [255, *range(150)]
    assert [s.class_id for s in sample.segments] == list(range(150))
    assert {s.class_id for s in sample.segments if s.is_thing} == ADE20K.thing_classes
    assert build_target(sample, "semantic").labels.tolist() == list(range(150))
    # Things are not told apart in this map: no instance may be learnt from it.
    assert build_target(sample, "instance").labels.tolist() == []


@pytest.mark.parametrize(
    ("value", "segments"), [(0, ()), (1, (Segment(1, 0, False),)), (13, (Segment(13, 12, True, is_crowd=True),))]
)
def test_empty_and_single_class_images(tmp_path, value, segments):
    write(tmp_path, "a", np.full((5, 7), value, np.uint8))
    sample = ADE20KDataset(tmp_path, "train")[0]
    assert sample.segments == segments
    assert (sample.panoptic == value).all()


def test_unknown_values_are_named(tmp_path):
    write(tmp_path, "shifted", np.array([[0, 149, 255]], np.uint8))
    with pytest.raises(UserError, match=r"shifted\.png has the value 255, but ADE20K's are 0 \(void\) to 150"):
        ADE20KDataset(tmp_path, "train")[0]


def test_splits_and_missing_files(tmp_path):
    write(tmp_path, "b", np.ones((4, 4), np.uint8), "validation")
    write(tmp_path, "a", np.ones((4, 4), np.uint8), "validation")
    assert ADE20KDataset(tmp_path, "val").names == ["a", "b"]
    with pytest.raises(
        UserError,
        match=r"images.training does not exist; expected are files \*\.jpg: download .*ADEChallengeData2016\.zip",
    ):
        ADE20KDataset(tmp_path, "train")
    (tmp_path / "annotations" / "validation" / "b.png").unlink()
    with pytest.raises(UserError, match=r"b\.jpg has no annotation"):
        ADE20KDataset(tmp_path, "val")
    assert ADE20KDataset(tmp_path, "val", on_error="skip").names == ["a"]


def test_panoptic_annotation_must_have_been_made(tmp_path):
    with pytest.raises(UserError, match=r"does not exist: download"):
        ADE20KDataModule(tmp_path / "nowhere").make_dataset("val", None)
    write(tmp_path, "a", np.ones((4, 4), np.uint8), "validation")
    with pytest.raises(UserError, match=r"no panoptic annotation yet.*run `python scripts/prepare_ade20k.py .*`"):
        ADE20KDataModule(tmp_path).make_dataset("val", None)
    assert len(ADE20KDataModule(tmp_path, "semantic").make_dataset("val", None)) == 1


@pytest.mark.parametrize(("task", "edge"), [("panoptic", 640), ("semantic", 512)])
def test_default_transforms_are_the_papers(tmp_path, task, edge):
    data = ADE20KDataModule(tmp_path, task)
    assert data.train_transform.pipeline[0].height == data.eval_transform.shortest_edge == edge
