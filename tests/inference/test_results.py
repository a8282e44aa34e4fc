import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from pem_lightning.files import rgb_to_id
from pem_lightning.inference.postprocess import Instance
from pem_lightning.inference.results import coco_instance, write_coco_panoptic
from pem_lightning.types import ClassInfo, DatasetInfo, UserError
from tests.inference.toy import INFO, Stripes, predictor


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


def test_segments_are_described(photo):
    result = predictor("panoptic")(photo, "x")
    car, sky = result.segments
    assert (car.name, car.class_id, car.is_thing) == ("car", 0, True)
    assert (sky.name, sky.box[2:], sky.is_thing) == ("sky", (128, 64), False)
    for segment in result.segments:
        mask = result.panoptic.eq(segment.id).numpy()
        assert segment.area == mask.sum()
        rows, columns = np.nonzero(mask)
        assert segment.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert 0.9 < segment.score <= 1
    assert repr(result) == "SegmentedImage('x', 128 x 64: 2 segments)"


def test_instances_are_described_and_drawn(photo):
    result = predictor("instance")(photo)
    best = result.instances[0]
    assert (best.name, best.area, best.box[:2]) == ("car", int(best.mask.sum()), (0, 0))
    assert (result.overlay() != result.image).any(-1)[:, :60].mean() > 0.9


class Vague(Stripes):
    """Is surest of the class of its vaguest mask."""

    def forward(self, images):
        out = super().forward(images)
        masks = out.mask_logits.clamp(min=-9.0)
        masks[:, :3] = masks[:, :3].sign() * torch.tensor([0.1, 5.0, 1.0])[None, :, None, None]
        margins = torch.tensor([9.0, 3.0, 6.0, 9.0])[:, None]
        return out._replace(class_logits=out.class_logits / 9 * margins, mask_logits=masks)


def test_instances_come_by_falling_score_in_python_and_in_files(tmp_path, photo):
    result = predictor("instance", Vague((0, 0, 0)))(photo, "x")
    scores = [i.score for i in result.instances]
    assert len(scores) >= 3
    assert scores == sorted(scores, reverse=True)
    saved = json.loads(result.save(tmp_path, overlay=False)[0].read_text())
    assert [entry["score"] for entry in saved] == scores


class TestSave:
    def test_panoptic(self, tmp_path, photo):
        result = predictor("panoptic")(photo, name="x")
        files = result.save(tmp_path / "new" / "folder")
        assert [f.name for f in files] == ["x_overlay.png", "x_panoptic.png", "x_segments.json"]
        assert np.array_equal(rgb_to_id(np.asarray(Image.open(files[1]))), result.panoptic.numpy())
        assert [s["category_id"] for s in json.loads(files[2].read_text())] == [26, 23]
        assert (np.asarray(Image.open(files[0])) == result.overlay()).all()

    def test_semantic_with_official_ids(self, tmp_path, photo):
        files = predictor("semantic")(photo).save(tmp_path, "y.z")
        assert [f.name for f in files] == ["y.z_overlay.png", "y.z_semantic.png"]
        assert np.asarray(Image.open(files[1]))[0, [0, -1]].tolist() == [26, 23]

    @pytest.mark.parametrize(("ids", "nothing"), [((26, 23), 0), ((0, 23), 255), ((0, 300), 255)])
    def test_where_nothing_is_found_there_is_an_id_that_no_class_has(self, tmp_path, photo, ids, nothing):
        info = DatasetInfo(
            "toy", tuple(ClassInfo(name, (1, 2, 3), False, i) for name, i in zip("ab", ids, strict=True))
        )
        path = predictor("semantic", info=info, classes=["b"])(photo).save(tmp_path, overlay=False)[0]
        assert np.asarray(Image.open(path))[0, [0, -1]].tolist() == [nothing, ids[1]]

    def test_instances_as_coco_results(self, tmp_path, photo):
        result = predictor("instance")(photo)
        entry = json.loads(result.save(tmp_path)[1].read_text())[0]
        assert entry["category_id"] == 26
        assert np.array_equal(coco_mask.decode(entry["segmentation"]), result.instances[0].mask.numpy())

    @pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
    def test_masks_or_overlay_alone(self, tmp_path, photo, task):
        result = predictor(task)(photo, "x")
        assert [f.name for f in result.save(tmp_path, masks=False)] == ["x_overlay.png"]
        assert "x_overlay.png" not in [f.name for f in result.save(tmp_path, overlay=False)]

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path, photo):
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="file"):
            predictor("panoptic")(photo).save(tmp_path / "file")


def test_rle_of_a_mask_that_is_not_contiguous_is_cocos_own_encoding():
    mask = (torch.rand(37, 53, generator=torch.Generator().manual_seed(0)) > 0.7)[3:15, ::2]
    entry = coco_instance(Instance(mask, 0, 0.5), 7, INFO)
    expected = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    assert entry["segmentation"] == {"size": list(mask.shape), "counts": expected["counts"].decode()}
    assert entry["area"] == mask.sum()


def test_coco_panoptic_files_agree(tmp_path, photo):
    segment = predictor("panoptic")
    path = write_coco_panoptic((segment(photo, name) for name in "ab"), tmp_path, INFO)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.png", "b.png", "panoptic.json"]
    content = json.loads(path.read_text())
    assert content["images"][0] == {"id": "a", "file_name": "a.png", "height": 64, "width": 128}
    assert [(c["id"], c["isthing"]) for c in content["categories"]] == [(26, 1), (23, 0)]
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
