from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pem_lightning.data.cityscapes import (
    CITYSCAPES,
    CityscapesDataModule,
    CityscapesDataset,
    panoptic_from_instance_ids,
)
from pem_lightning.types import Segment, UserError
from tests.data.damage import save

OFFICIAL = (
    "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky "
    "person rider car truck bus train motorcycle bicycle"
)


def test_classes_are_the_official_ones():
    assert CITYSCAPES.num_classes == 19
    assert [name.replace(" ", "_") for name in CITYSCAPES.class_names] == OFFICIAL.split()
    assert CITYSCAPES.category_ids == (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    assert CITYSCAPES.thing_classes == frozenset(range(11, 19))
    assert CITYSCAPES.colors[[0, 10, 13]].tolist() == [[128, 64, 128], [70, 130, 180], [0, 0, 142]]


def test_reads_the_official_layout(tmp_path, write_sample):
    ids = np.array([[7, 7, 24000, 24001], [0, 24, 33999, 1], [26, 29001, 10, 23]], np.uint16)
    image = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    write_sample("ulm_000001_000019", ids, image=image)
    write_sample("aachen_000000_000019", ids)
    dataset = CityscapesDataset(tmp_path, "train")
    assert [dataset[i].name for i in range(len(dataset))] == ["aachen_000000_000019", "ulm_000001_000019"]
    sample = dataset[1]
    assert sample.image.dtype == torch.uint8
    assert torch.equal(sample.image, torch.from_numpy(image).permute(2, 0, 1))
    # Ids beyond 8 bit survive; ego vehicle, caravan, rail track and 0 are void.
    assert sample.panoptic.dtype == torch.int32
    assert sample.panoptic.tolist() == [[7, 7, 24000, 24001], [0, 24, 33999, 0], [26, 0, 0, 23]]
    assert sample.segments == (
        Segment(7, 0, False),
        Segment(23, 10, False),
        Segment(24, 11, True, is_crowd=True),
        Segment(26, 13, True, is_crowd=True),
        Segment(24000, 11, True),
        Segment(24001, 11, True),
        Segment(33999, 18, True),
    )


@given(st.lists(st.sampled_from([0, 1, 4, 7, 23, 24, 29, 33, 24000, 26012, 30001, 33999]), min_size=1))
def test_panoptic_rules_pixel_by_pixel(values):
    panoptic, segments = panoptic_from_instance_ids(np.array([values], np.uint16))
    kinds = {s.id: s for s in segments}
    assert len(kinds) == len(segments)
    assert set(kinds) == set(np.unique(panoptic)) - {0}
    for value, got in zip(values, panoptic[0].tolist(), strict=True):
        label = value // 1000 if value >= 1000 else value
        if label not in CITYSCAPES.category_ids:
            assert got == 0
            continue
        assert got == value
        assert CITYSCAPES.category_ids[kinds[value].class_id] == label
        assert kinds[value].is_thing == (label >= 24)
        assert kinds[value].is_crowd == (24 <= value < 1000)


@pytest.mark.parametrize("value", [34, 255, 999, 1000, 7001, 23999, 34000, 65535])
def test_undefined_ids_are_named(tmp_path, write_sample, value):
    write_sample("ulm_0_0", np.array([[7, 24000, value]], np.uint16))
    with pytest.raises(UserError, match=rf"_instanceIds\.png has ids that Cityscapes does not define \({value}\)"):
        CityscapesDataset(tmp_path, "train")[0]


def test_odd_size_all_void_and_single_class(tmp_path, write_sample):
    write_sample("ulm_0_0", np.zeros((5, 7), np.uint16))
    write_sample("ulm_1_0", np.full((1, 1), 11, np.uint8))
    void, single = CityscapesDataset(tmp_path, "train")
    assert (void.segments, void.panoptic.unique().tolist()) == ((), [0])
    assert (single.segments, single.panoptic.tolist()) == ((Segment(11, 2, False),), [[11]])


def test_files_of_cityscapesscripts_do_not_disturb(tmp_path, write_sample):
    write_sample("ulm_0_0", np.full((4, 4), 7, np.uint16))
    folder = tmp_path / "gtFine" / "train" / "ulm"
    for kind in ("labelTrainIds", "instanceTrainIds", "labelIds", "color"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / f"ulm_0_0_gtFine_{kind}.png")
    (folder / "ulm_0_0_gtFine_polygons.json").write_text("{}")
    (tmp_path / "gtFine" / "cityscapes_panoptic_train").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "gtFine" / "cityscapes_panoptic_train" / "ulm_0_0_gtFine_panoptic.png")
    (tmp_path / "gtFine" / "cityscapes_panoptic_train.json").write_text("{}")
    dataset = CityscapesDataset(tmp_path, "train")
    assert dataset.names == ["ulm_0_0"]
    assert [path.name for path in dataset.files(0)] == ["ulm_0_0_leftImg8bit.png", "ulm_0_0_gtFine_instanceIds.png"]
    assert dataset[0].panoptic.unique().tolist() == [7]


def test_coarse_set(tmp_path, write_sample):
    stem = "train_extra/augsburg/augsburg_000000_000000"
    save(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", np.full((4, 6, 3), 26, np.uint8))
    save(tmp_path / f"gtCoarse/{stem}_gtCoarse_instanceIds.png", np.full((4, 6), 26, np.uint8))
    sample = CityscapesDataset(tmp_path, "train_extra")[0]
    assert sample.segments == (Segment(26, 13, True, is_crowd=True),)
    write_sample("ulm_0_0", np.full((4, 4), 7, np.uint16))
    both = CityscapesDataModule(tmp_path, train_splits=["train", "train_extra"]).make_dataset("train", None)
    assert [sample.name for sample in both] == ["augsburg_000000_000000", "ulm_0_0"]
    assert CityscapesDataModule(tmp_path).make_dataset("train", None).names == ["ulm_0_0"]


def test_unknown_split(tmp_path):
    with pytest.raises(UserError, match=r"no split 'extra': choose from train, val, train_extra, test"):
        CityscapesDataset(tmp_path, "extra")


def test_test_split_has_images_only(tmp_path):
    for city in ("berlin", "bonn"):
        image = np.full((4, 6, 3), (9, 8, 7), np.uint8)
        save(tmp_path / f"leftImg8bit/test/{city}/{city}_000000_000019_leftImg8bit.png", image)
    dataset = CityscapesDataset(tmp_path, "test")
    assert dataset.names == ["berlin_000000_000019", "bonn_000000_000019"]
    assert dataset[0].segments == ()
    assert dataset[0].panoptic.tolist() == [[0] * 6] * 4
    assert dataset[0].image[:, 0, 0].tolist() == [9, 8, 7]


def test_missing_data_says_where_and_how(tmp_path, write_sample):
    write_sample("ulm_0_0", np.full((4, 4), 7, np.uint16))
    (tmp_path / "gtFine" / "train").rename(tmp_path / "gtFine" / "val")
    with pytest.raises(UserError, match=r"gtFine.train does not exist"):
        CityscapesDataset(tmp_path, "train")
    with pytest.raises(UserError) as caught:
        CityscapesDataset(tmp_path / "nowhere", "train")
    message = str(caught.value)
    assert str(tmp_path / "nowhere" / "leftImg8bit" / "train") in message
    for cure in ("cityscapes-dataset.com", "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip", "dataset.root"):
        assert cure in message
    assert "dataset=synthetic" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("orphan", "missing"),
    [
        ("leftImg8bit/train/ulm/ulm_1_0_leftImg8bit", "annotation"),
        ("gtFine/train/ulm/ulm_1_0_gtFine_instanceIds", "image"),
    ],
)
def test_unpaired_file_is_named(tmp_path, write_sample, orphan, missing):
    write_sample("ulm_0_0", np.full((4, 4), 7, np.uint16))
    (tmp_path / f"{orphan}.png").touch()
    with pytest.raises(UserError, match=rf"{Path(orphan).name}.png has no {missing}"):
        CityscapesDataset(tmp_path, "train")
