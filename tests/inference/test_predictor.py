import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

import pem_lightning
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.data.transforms import EvalTransform
from pem_lightning.files import rgb_to_id
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.inference.predictor import Photo, Predictor
from pem_lightning.inference.results import write_coco_panoptic
from pem_lightning.models.pem import build_pem
from pem_lightning.types import ClassInfo, DatasetInfo, Predictions, UserError

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
        self.batches = []

    def forward(self, images):
        assert not self.training
        self.seen = images
        self.batches.append(tuple(images.shape))
        height, width = (-(-side // 32) * 8 for side in images.shape[-2:])
        left = torch.full((height, width), -9.0)
        left[:, : width // 2] = 9
        class_logits = torch.tensor([[9.0, 0, 0], [0, 9, 0], [0, 0, 9]])
        masks = torch.stack([left, -left, left])
        return Predictions(class_logits.expand(len(images), -1, -1), masks.expand(len(images), -1, -1, -1))


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


def test_segments_are_described(photo):
    result = predictor("panoptic")(photo)
    person, sky = result.segments
    assert (person.name, person.class_id, person.is_thing) == ("person", 0, True)
    assert (sky.name, sky.box[2:], sky.is_thing) == ("sky", (128, 64), False)
    for segment in result.segments:
        mask = result.panoptic.eq(segment.id).numpy()
        assert segment.area == mask.sum()
        rows, columns = np.nonzero(mask)
        assert segment.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert 0.9 < segment.score <= 1


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
    best = result.instances[0]
    assert (best.name, best.area, best.box[:2]) == ("person", int(best.mask.sum()), (0, 0))
    assert [i.score for i in predictor("instance", score_threshold=0.5)(photo).instances] == [best.score]


def test_a_repr_is_short(photo):
    assert repr(predictor("panoptic")(photo, "x")) == "SegmentedImage('x', 128 x 64: 2 segments)"


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


class TestInputs:
    def test_all_kinds_give_the_same(self, saved, photo):
        opaque = np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])
        tensor = torch.from_numpy(photo).permute(2, 0, 1)
        with Image.open(saved) as opened:
            results = predictor("panoptic")([saved, str(saved), opened, photo, opaque, tensor])
        assert [r.name for r in results] == ["street", "street", "image", "image", "image", "image"]
        for result in results:
            assert (result.image == photo).all()
            assert result.panoptic.equal(results[0].panoptic)

    def test_a_list_comes_back_in_order_and_runs_in_batches_of_one_size(self, photo):
        model = Halves()
        images = [photo, photo[:32], photo, photo[:32], photo]
        results = predictor("panoptic", model, batch_size=2)(images, ["a", "b", "c", "d", "e"])
        assert [r.name for r in results] == ["a", "b", "c", "d", "e"]
        assert [tuple(r.panoptic.shape) for r in results] == [image.shape[:2] for image in images]
        assert sorted(shape[::2] for shape in model.batches) == [(1, 64), (2, 32), (2, 64)]

    def test_an_empty_list(self):
        assert predictor("panoptic")([]) == []

    def test_as_many_names_as_images(self, photo):
        with pytest.raises(ValueError, match="shorter"):
            predictor("panoptic")([photo, photo], ["a"])

    def test_a_stream_reads_no_further_than_it_must(self, photo):
        taken = []

        def photos():
            for i in range(9):
                taken.append(i)
                yield Photo(str(i), photo)

        stream = predictor("panoptic", batch_size=2).stream(photos())
        assert [next(stream).name, next(stream).name] == ["0", "1"]
        assert taken == [0, 1]


class TestClasses:
    def test_others_are_left_out_of_every_task(self, photo):
        panoptic = predictor("panoptic", classes=["sky"])(photo)
        assert [s.name for s in panoptic.segments] == ["sky"]
        assert set(panoptic.panoptic.unique().tolist()) == {0, panoptic.segments[0].id}
        assert (panoptic.overlay(draw_names=False)[:, :55] == photo[:, :55]).all()
        semantic = predictor("semantic", classes=["person"])(photo)
        assert set(semantic.semantic.unique().tolist()) == {0, 255}
        assert (semantic.overlay(draw_names=False)[:, 75:] == photo[:, 75:]).all()
        assert predictor("instance", classes="sky")(photo).instances == ()

    def test_in_files_nothing_is_an_id_that_no_class_has(self, tmp_path, photo):
        path = predictor("semantic", classes=["person"])(photo).save(tmp_path, overlay=False)[0]
        assert np.asarray(Image.open(path))[0, [0, -1]].tolist() == [24, 0]

    def test_a_wrong_name_gets_the_nearest_and_all(self):
        with pytest.raises(UserError, match=r"no class persn \(did you mean person\?\); choose from: person, sky"):
            predictor("panoptic", classes=["sky", "persn"])


@pytest.mark.parametrize(
    ("option", "message"),
    [({"device": "cuda:99"}, "device=cuda:99"), ({"device": "gpu"}, "device=gpu"), ({"batch_size": 0}, "batch_size=0")],
)
def test_impossible_options(option, message):
    inference = TaskInference("panoptic", INFO.thing_classes)
    with pytest.raises(UserError, match=message):
        Predictor.from_parts(Halves(), INFO, inference, **option)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_said_in_one_line(photo, error):
    def fail(images):
        raise error

    model = Halves()
    model.forward = fail
    with pytest.raises(UserError, match="128 x 64 pixels needs more memory than cpu has: shrink"):
        predictor("panoptic", model)(photo)


def test_bugs_of_the_model_stay_visible(photo):
    def fail(images):
        raise RuntimeError("a bug")

    model = Halves()
    model.forward = fail
    with pytest.raises(RuntimeError, match="a bug"):
        predictor("panoptic", model)(photo)


@pytest.mark.slow
def test_sixty_seven_megapixels():
    result = predictor("panoptic")(np.zeros((8192, 8192, 3), np.uint8))
    assert [s.area for s in result.segments] == [8192 * 4096] * 2
    assert result.overlay().shape == (8192, 8192, 3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of a network that has learnt nothing."""
    torch.manual_seed(0)
    settings = {"backbone": "stdc1", "num_layers": 1, "num_queries": 6, "hidden_channels": 16}
    network = build_pem(num_classes=2, **settings)
    config = {
        "network": {"_target_": "pem_lightning.build_pem", **settings},
        "task": {
            "name": "panoptic",
            "inference": {"resize_first": True, "object_mask_threshold": 0.1, "overlap_threshold": 0.2},
        },
        "recipe": {
            "eval_transform": {
                "_target_": "pem_lightning.data.EvalTransform",
                "shortest_edge": 32,
                "max_size": None,
            }
        },
    }
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    content = {
        "global_step": 1,
        "state_dict": {f"network.{key}": value for key, value in network.state_dict().items()},
        CHECKPOINT_KEY: {"config": config, "overrides": [], "dataset_info": INFO.to_dict()},
    }
    torch.save(content, path)
    return path


class TestCheckpoint:
    def test_is_all_that_is_needed(self, path, photo):
        predictor = pem_lightning.Predictor(path, device="cpu")
        assert predictor.info == INFO
        assert predictor.inference.task == "panoptic"
        assert (predictor.inference.object_mask_threshold, predictor.inference.overlap_threshold) == (0.1, 0.2)
        result = predictor(photo)
        assert result.panoptic.shape == (64, 128)
        assert predictor.prepare(photo).shape == (3, 32, 64)

    def test_options_win(self, path, photo):
        predictor = Predictor(str(path), task="semantic", device="cpu", overlap_threshold=0.0, classes=["sky"])
        assert (predictor.inference.object_mask_threshold, predictor.inference.overlap_threshold) == (0.1, 0.0)
        assert set(predictor(photo).semantic.unique().tolist()) <= {1, 255}

    def test_batches_give_what_single_images_give(self, path):
        images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8))
        together = Predictor(path, task="semantic", device="cpu", batch_size=3)(images)
        for image, result in zip(images, together, strict=True):
            alone = Predictor(path, task="semantic", device="cpu")(image)
            assert (alone.semantic == result.semantic).float().mean() > 0.99

    def test_mistakes(self, path, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            Predictor(tmp_path / "gone.ckpt")
        with pytest.raises(UserError, match="unknown task 'panotic'"):
            Predictor(path, task="panotic")


@pytest.mark.slow
def test_the_package_stays_light():
    program = (
        "import sys, pem_lightning; assert not {'hydra', 'lightning', 'cv2', 'albumentations'} & set(sys.modules); "
        "from pem_lightning import Predictor; assert Predictor is pem_lightning.Predictor"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError, match="Predictr"):
        pem_lightning.Predictr  # noqa: B018


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

    @pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
    def test_masks_or_overlay_alone(self, tmp_path, photo, task):
        result = predictor(task)(photo, "x")
        assert [f.name for f in result.save(tmp_path, masks=False)] == ["x_overlay.png"]
        assert "x_overlay.png" not in [f.name for f in result.save(tmp_path, overlay=False)]

    def test_official_ids_of_any_size(self, tmp_path, photo):
        classes = (ClassInfo("person", (1, 2, 3), True, 0), ClassInfo("sky", (4, 5, 6), False, 300))
        inference = TaskInference("semantic", {0}, resize_first=False)
        segment = Predictor.from_parts(Halves(), DatasetInfo("big", classes), inference, device="cpu", classes=["sky"])
        path = segment(photo).save(tmp_path, overlay=False)[0]
        assert np.asarray(Image.open(path))[0, [0, -1]].tolist() == [255, 300]

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
