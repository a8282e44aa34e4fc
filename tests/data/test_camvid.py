"""CamVid in SegNet's layout and in that of a semantic folder, on small files that the tests write."""

import numpy as np
import pytest
import torch

from pem_lightning.data.camvid import CAMVID, CamVidDataModule, CamVidDataset
from pem_lightning.data.semantic_folder import SemanticFolderDataModule, read_classes
from pem_lightning.types import UserError
from tests.data.damage import save

CLASSES = "classes:\n" + "".join(f"- {{name: {c.name}, color: {list(c.color)}}}\n" for c in CAMVID.classes)


def write(root, layout, values=((0, 10, 11), (3, 3, 8))):
    """Two images in each split."""
    values = np.array(values, np.uint8)
    for split in ("train", "val", "test"):
        for name in (f"{split}_0", f"{split}_1"):
            pixels = np.full((*values.shape, 3), 9, np.uint8)
            if layout == "segnet":
                save(root / split / f"{name}.png", pixels)
                save(root / f"{split}annot" / f"{name}.png", values)
            else:
                save(root / "images" / split / f"{name}.webp", pixels)
                save(root / "labels" / split / f"{name}.png", values)
    return root


@pytest.mark.parametrize("layout", ["segnet", "folders"])
@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_both_layouts_as_they_are(tmp_path, layout, split):
    dataset = CamVidDataset(write(tmp_path, layout), split)
    assert dataset.names == [f"{split}_0", f"{split}_1"]
    assert dataset[1].class_map().tolist() == [[0, 10, 255], [3, 3, 8]]
    assert dataset.info is CAMVID
    assert dataset[0].image.shape == (3, 2, 3)


def test_classes_are_those_of_segnet():
    """Names and colours of the classes.yaml that goes with the maps."""
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    assert CAMVID.class_names == tuple(names.split())
    assert CAMVID.category_ids == tuple(range(11))
    assert CAMVID.thing_classes == frozenset()
    assert len({c.color for c in CAMVID.classes}) == 11


def test_a_classes_file_may_go_with_the_folders(tmp_path):
    write(tmp_path, "folders")
    (tmp_path / "classes.yaml").write_text(CLASSES + "void: [11]\n")
    assert read_classes(tmp_path / "classes.yaml")[0].classes == CAMVID.classes
    assert CamVidDataset(tmp_path, "val")[0].class_map().tolist() == [[0, 10, 255], [3, 3, 8]]
    (tmp_path / "classes.yaml").write_text("[road, car]")
    with pytest.raises(UserError, match=r"classes\.yaml has other classes than CamVid .*dataset=semantic_folder"):
        CamVidDataset(tmp_path, "val")


def test_segnets_list_says_what_is_in_a_split(tmp_path):
    write(tmp_path, "segnet")
    line = "/SegNet/CamVid/train/{0}.png /SegNet/CamVid/trainannot/{0}.png\n"
    (tmp_path / "train.txt").write_text(line.format("train_1") + "\n")
    assert CamVidDataset(tmp_path, "train").names == ["train_1"]
    assert len(CamVidDataset(tmp_path, "val")) == 2
    (tmp_path / "train.txt").write_text(line.format("train_1") + line.format("train_7"))
    with pytest.raises(UserError, match=r"train lacks train_7, which the list of train has: expected are"):
        CamVidDataset(tmp_path, "train")
    assert CamVidDataset(tmp_path, "train", on_error="skip").names == ["train_1"]


def test_mistakes_name_the_cure(tmp_path):
    with pytest.raises(UserError, match=r"train does not exist: expected are root/\{train,val,test\}/ and"):
        CamVidDataset(tmp_path / "nowhere", "train")
    write(tmp_path, "segnet", [[12]])
    with pytest.raises(UserError, match=r"train_0\.png has the value 12, .*values are 0 to 10, and 11 for void"):
        CamVidDataset(tmp_path, "train")[0]
    (tmp_path / "valannot" / "val_1.png").unlink()
    with pytest.raises(UserError, match=r"val_1\.png has no annotation"):
        CamVidDataset(tmp_path, "val")
    with pytest.raises(UserError, match=r"dataset=camvid has no task=panoptic: choose task=semantic"):
        CamVidDataModule(tmp_path, "panoptic")


@pytest.mark.parametrize(
    ("module", "layout"),
    [(CamVidDataModule, "segnet"), (CamVidDataModule, "folders"), (SemanticFolderDataModule, "folders")],
)
def test_no_training_sees_the_test_split(tmp_path, module, layout):
    write(tmp_path, layout, np.zeros((40, 50)))
    (tmp_path / "classes.yaml").write_text(CLASSES)
    data = module(tmp_path, batch_size=2, num_workers=0)
    data.setup("fit")
    assert {name for batch in data.train_dataloader() for name in batch.names} == {"train_0", "train_1"}
    assert [name for batch in data.val_dataloader() for name in batch.names] == ["val_0", "val_1"]
    data = module(tmp_path, batch_size=2, num_workers=0, eval_split="test")
    data.setup("validate")
    assert [name for batch in data.val_dataloader() for name in batch.names] == ["test_0", "test_1"]
    assert data.train_dataset.names == ["train_0", "train_1"]
    with pytest.raises(UserError, match=r"dataset\.eval_split=test is for evaluate\.py: trainings are validated on"):
        data.setup("fit")


def test_default_crops(tmp_path):
    data = CamVidDataModule(write(tmp_path, "segnet", np.zeros((36, 48))), batch_size=2, num_workers=0)
    (batch,) = data.train_dataloader()
    assert [image.shape for image in batch.images] == [(3, 288, 384)] * 2
    assert torch.equal(data.val_dataset[0].panoptic, torch.ones(36, 48, dtype=torch.int32))
    assert data.val_dataset[0].image.shape == (3, 360, 480)
