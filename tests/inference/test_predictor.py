import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from pem_lightning.data.transforms import EvalTransform
from pem_lightning.errors import UserError
from pem_lightning.inference.predictor import Predictor
from pem_lightning.inference.results import write_coco_panoptic
from pem_lightning.inference.task import TaskInference
from pem_lightning.panoptic_png import rgb_to_id
from pem_lightning.types import ClassInfo, DatasetInfo, Predictions

INFO = DatasetInfo(
    "toy",
    (
        ClassInfo("person", (220, 20, 60), True, 24),
        ClassInfo("sky", (70, 130, 180), False, 23),
    ),
)


class Halves(nn.Module):
    """Sees a person in the left and sky in the right half of the padded image, sure of both."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, images):
        assert not self.training
        self.seen = images
        height, width = (-(-side // 32) * 8 for side in images.shape[-2:])
        left = torch.full((height, width), -9.0)
        left[:, : width // 2] = 9
        class_logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
        return Predictions(class_logits[None], torch.stack([left, -left, left])[None])


def predictor(task, model=None, **options):
    inference = TaskInference(task, INFO.thing_classes, resize_first=task != "semantic")
    return Predictor.from_parts(model or Halves(), INFO, inference, device="cpu", **options)


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


@pytest.fixture
def saved(tmp_path, photo):
    path = tmp_path / "street.png"
    Image.fromarray(photo).save(path)
    return path


def test_panoptic(saved):
    result = predictor("panoptic")(saved)
    assert result.name == "street"
    assert result.panoptic[:, :60].eq(1).all()
    assert result.panoptic[:, 68:].eq(2).all()
    assert [(s.id, s.class_id, s.is_thing) for s in result.segments] == [(1, 0, True), (2, 1, False)]
    assert result.semantic is None


def test_semantic(photo):
    result = predictor("semantic")(photo)
    assert result.name == "image"
    assert result.semantic[:, :60].eq(0).all()
    assert result.semantic[:, 68:].eq(1).all()
    assert result.panoptic is None


def test_instances(photo):
    result = predictor("instance")(photo)
    assert {i.class_id for i in result.instances} == {0}
    assert result.instances[0].mask[:, :60].all()
    assert (result.overlay() != result.image).any(-1)[:, :60].mean() > 0.9


def test_the_model_gets_normalised_pixels():
    model = Halves()
    predictor("panoptic", model)(np.full((32, 32, 3), 255, np.uint8))
    expected = (255 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.allclose(model.seen[0, :, 0, 0].numpy(), expected, atol=1e-5)


def test_sizes_that_need_padding_and_resizing(photo):
    model = Halves()
    result = predictor("panoptic", model, resize=EvalTransform(50, 90))(photo)
    assert model.seen.shape == (1, 3, 45, 90)
    assert result.panoptic.shape == (64, 128)
    # the padded width is 96, of which 90 is image: the border between the halves is at 48 of 90
    assert int(result.panoptic.eq(1).sum(1)[30]) == pytest.approx(128 * 48 / 90, abs=1)


@pytest.mark.parametrize("size", [(1, 1), (7, 130), (32, 32)])
def test_any_size(size):
    for task in ("panoptic", "semantic", "instance"):
        result = predictor(task)(np.zeros((*size, 3), np.uint8))
        assert result.overlay().shape == (*size, 3)


def test_a_read_only_array_gives_no_warning(photo, recwarn):
    photo.setflags(write=False)
    predictor("panoptic")(photo)
    assert not recwarn.list


class TestSave:
    def test_panoptic(self, tmp_path, photo):
        result = predictor("panoptic")(photo, name="x")
        files = result.save(tmp_path / "new" / "folder")
        assert [f.name for f in files] == ["x_overlay.png", "x_panoptic.png", "x_segments.json"]
        assert np.array_equal(rgb_to_id(np.asarray(Image.open(files[1]))), result.panoptic.numpy())
        assert [s["category_id"] for s in json.loads(files[2].read_text())] == [24, 23]
        assert (np.asarray(Image.open(files[0])) == result.overlay()).all()

    def test_semantic_with_official_ids(self, tmp_path, photo):
        files = predictor("semantic")(photo).save(tmp_path, "y.z")
        assert [f.name for f in files] == ["y.z_overlay.png", "y.z_semantic.png"]
        assert np.asarray(Image.open(files[1]))[0, [0, -1]].tolist() == [24, 23]

    def test_instances_as_coco_results(self, tmp_path, photo):
        result = predictor("instance")(photo)
        entry = json.loads(result.save(tmp_path)[1].read_text())[0]
        assert entry["category_id"] == 24
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), result.instances[0].mask.numpy())

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path, photo):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file"):
            predictor("panoptic")(photo).save(tmp_path / "file")


class TestCocoPanoptic:
    def test_files_agree(self, tmp_path, photo):
        segment = predictor("panoptic")
        path = write_coco_panoptic((segment(photo, name) for name in "ab"), tmp_path, INFO)
        assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.png", "b.png", "panoptic.json"]
        content = json.loads(path.read_text())
        assert content["images"][0] == {"id": "a", "file_name": "a.png", "height": 64, "width": 128}
        assert [(c["id"], c["isthing"]) for c in content["categories"]] == [(24, 1), (23, 0)]
        annotation = content["annotations"][1]
        assert (annotation["image_id"], annotation["file_name"]) == ("b", "b.png")
        ids = rgb_to_id(np.asarray(Image.open(tmp_path / "panoptic" / "b.png")))
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(ids)) - {0}
        for segment in annotation["segments_info"]:
            mask = ids == segment["id"]
            rows, columns = np.nonzero(mask)
            assert segment["area"] == mask.sum()
            left, top = columns.min(), rows.min()
            assert segment["bbox"] == [left, top, columns.max() - left + 1, rows.max() - top + 1]
            assert segment["iscrowd"] == 0
            assert 0.9 < segment["score"] <= 1

    def test_two_images_of_one_name_are_refused(self, tmp_path, photo):
        result = predictor("panoptic")(photo, "a")
        with pytest.raises(UserError, match="named a"):
            write_coco_panoptic([result, result], tmp_path, INFO)

    def test_other_results_are_refused(self, tmp_path, photo):
        result = predictor("semantic")(photo, "a")
        with pytest.raises(ValueError, match="not panoptic"):
            write_coco_panoptic([result], tmp_path, INFO)
