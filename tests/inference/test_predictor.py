import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pem_lightning
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.data.transforms import EvalTransform
from pem_lightning.inference.predictor import Photo, Predictor
from pem_lightning.models.pem import build_pem
from pem_lightning.types import UserError
from tests.inference.toy import INFO, Stripes, predictor


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)


def test_every_task(photo, recwarn):
    photo.setflags(write=False)
    panoptic, semantic, instance = (predictor(task)(photo) for task in ("panoptic", "semantic", "instance"))
    assert panoptic.panoptic[:, :60].eq(1).all()
    assert panoptic.panoptic[:, 68:].eq(2).all()
    assert [(s.id, s.class_id, s.is_thing) for s in panoptic.segments] == [(1, 0, True), (2, 1, False)]
    assert not recwarn.list  # of arrays that cannot be written
    assert panoptic.semantic is panoptic.instances is semantic.panoptic is None
    assert semantic.semantic[:, :60].eq(0).all()
    assert semantic.semantic[:, 68:].eq(1).all()
    assert {i.class_id for i in instance.instances} == {0}
    best = instance.instances[0]
    assert best.mask[:, :60].all()
    assert [i.score for i in predictor("instance", score_threshold=0.5)(photo).instances] == [best.score]


def test_the_model_gets_normalised_pixels():
    model = Stripes()
    predictor("panoptic", model)(np.full((32, 32, 3), 255, np.uint8))
    expected = (255 - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.allclose(model.inputs[0][0, :, 0, 0].numpy(), expected, atol=1e-5)


def test_sizes_that_need_padding_and_resizing(photo):
    model = Stripes()
    result = predictor("panoptic", model, resize=EvalTransform(50, 90))(photo)
    assert model.inputs[0].shape == (1, 3, 45, 90)
    assert result.panoptic.shape == (64, 128)
    # The padded width is 96, of which 90 is image: the border between the stripes is at 48 of 90.
    assert int(result.panoptic.eq(1).sum(1)[30]) == pytest.approx(128 * 48 / 90, abs=1)


@pytest.mark.parametrize("size", [(1, 1), (7, 130)])
@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_any_size(task, size):
    assert predictor(task)(np.zeros((*size, 3), np.uint8)).overlay().shape == (*size, 3)


class TestInputs:
    def test_all_kinds_give_the_same(self, tmp_path, photo):
        saved = tmp_path / "street.png"
        Image.fromarray(photo).save(saved)
        opaque = np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])
        tensor = torch.from_numpy(photo).permute(2, 0, 1)
        with Image.open(saved) as opened:
            results = predictor("panoptic")([saved, str(saved), opened, photo, opaque, tensor])
        assert [r.name for r in results] == ["street", "street", "image", "image", "image", "image"]
        for result in results:
            assert (result.image == photo).all()
            assert result.panoptic.equal(results[0].panoptic)

    def test_views_that_run_backwards(self, photo):
        segment = predictor("panoptic")
        for view in (photo[..., ::-1], np.fliplr(photo), np.flipud(photo), np.asfortranarray(photo)):
            result = segment(view)
            assert (result.image == view).all()
            assert result.overlay().shape == photo.shape
            assert next(segment.stream([Photo("x", view)])).panoptic.equal(result.panoptic)

    def test_a_list_comes_back_in_order_and_runs_in_batches_of_one_size(self, photo):
        model = Stripes()
        images = [photo, photo[:32], photo, photo[:32], photo]
        results = predictor("panoptic", model, batch_size=2)(images, ["a", "b", "c", "d", "e"])
        assert [r.name for r in results] == ["a", "b", "c", "d", "e"]
        assert [tuple(r.panoptic.shape) for r in results] == [image.shape[:2] for image in images]
        assert predictor("panoptic")([]) == []
        assert sorted(tuple(x.shape[::2]) for x in model.inputs) == [(1, 64), (2, 32), (2, 64)]

    def test_a_stream_reads_no_further_than_it_must(self, photo):
        taken = []

        def photos():
            for i in range(9):
                taken.append(i)
                yield Photo(str(i), photo)

        stream = predictor("panoptic", batch_size=2).stream(photos())
        assert [next(stream).name, next(stream).name] == ["0", "1"]
        assert taken == [0, 1]


def test_other_classes_are_left_out_of_every_task(photo):
    panoptic = predictor("panoptic", classes=["sky"])(photo)
    assert [s.name for s in panoptic.segments] == ["sky"]
    assert set(panoptic.panoptic.unique().tolist()) == {0, panoptic.segments[0].id}
    assert (panoptic.overlay(draw_names=False)[:, :55] == photo[:, :55]).all()
    semantic = predictor("semantic", classes=["car"])(photo)
    assert set(semantic.semantic.unique().tolist()) == {0, 255}
    assert (semantic.overlay(draw_names=False)[:, 75:] == photo[:, 75:]).all()
    assert predictor("instance", classes="sky")(photo).instances == ()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"device": "cuda:99"}, "device=cuda:99"),
        ({"device": "gpu"}, "device=gpu"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"flip": True}, "task=semantic"),
        ({"classes": ["sky", "carr"]}, r"no class carr \(did you mean car\?\); choose from: car, sky"),
    ],
)
def test_impossible_options(option, message):
    with pytest.raises(UserError, match=message):
        Predictor.from_parts(Stripes(), INFO, predictor().inference, **option)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), UserError, "128 x 64 pixels needs more memory than cpu has: shrink"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), UserError, "needs more memory than cpu has"),
        (RuntimeError("a bug"), RuntimeError, "a bug"),
    ],
)
def test_too_little_memory_is_said_in_one_line_and_bugs_stay_visible(photo, error, kind, message):
    def fail(images):
        raise error

    model = Stripes()
    model.forward = fail
    with pytest.raises(kind, match=message):
        predictor("panoptic", model)(photo)


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
            "eval_transform": {"_target_": "pem_lightning.data.EvalTransform", "shortest_edge": 32, "max_size": None}
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
        segment = pem_lightning.Predictor(path, device="cpu")
        assert segment.info == INFO
        inference = segment.inference
        assert (inference.task, inference.object_mask_threshold, inference.overlap_threshold) == ("panoptic", 0.1, 0.2)
        assert segment(photo).panoptic.shape == (64, 128)
        assert segment.prepare(photo).shape == (3, 32, 64)

    def test_options_win_and_batches_give_what_single_images_give(self, path):
        segment = Predictor(str(path), task="semantic", device="cpu", overlap_threshold=0.0, batch_size=3)
        assert (segment.inference.object_mask_threshold, segment.inference.overlap_threshold) == (0.1, 0.0)
        images = list(np.random.default_rng(0).integers(0, 256, (3, 40, 56, 3), np.uint8))
        for image, result in zip(images, segment(images), strict=True):
            assert (segment(image).semantic == result.semantic).float().mean() > 0.99

    @pytest.mark.parametrize(
        "options", [{}, {"task": "semantic", "flip": True}, {"task": "instance", "precision": "bfloat16"}]
    )
    @pytest.mark.parametrize("copies", ["pickle", "cloudpickle", "deepcopy"])
    def test_copies_and_pickles_give_the_same(self, path, photo, options, copies):
        """As joblib, Ray and processes that are spawned need it; also of one that was used, and of results."""
        segment = Predictor(path, device="cpu", classes=["car"], **options)
        check_copies(segment, photo, copies)

    @pytest.mark.slow
    def test_a_pickle_is_read_by_another_process(self, path, photo, tmp_path):
        segment = Predictor(path, device="cpu")
        (tmp_path / "predictor").write_bytes(pickle.dumps((segment, photo)))
        program = (
            "import pickle, sys; segment, photo = pickle.load(open(sys.argv[1], 'rb')); "
            "pickle.dump(segment(photo), open(sys.argv[2], 'wb'))"
        )
        files = [str(tmp_path / "predictor"), str(tmp_path / "result")]
        subprocess.run([sys.executable, "-c", program, *files], check=True, cwd=Path(__file__).parents[2])
        result = pickle.loads((tmp_path / "result").read_bytes())
        assert result.panoptic.equal(segment(photo).panoptic)

    def test_mistakes(self, path, tmp_path):
        with pytest.raises(UserError, match="does not exist"):
            Predictor(tmp_path / "gone.ckpt")
        with pytest.raises(UserError, match="unknown task 'panotic'"):
            Predictor(path, task="panotic")


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
@pytest.mark.parametrize("copies", ["pickle", "cloudpickle", "deepcopy"])
def test_copies_and_pickles_of_parts(task, copies, photo):
    check_copies(predictor(task, resize=EvalTransform(32, 90), batch_size=2), photo, copies)


def check_copies(segment, photo, copies):
    before = segment(photo)
    if copies == "deepcopy":
        copied, after = copy.deepcopy((segment, before))
    else:
        copied, after = pickle.loads(pytest.importorskip(copies).dumps((segment, before)))
    for result in (copied(photo), after):
        assert result.segments == before.segments
        for kind in ("panoptic", "semantic"):
            ours, theirs = getattr(before, kind), getattr(result, kind)
            assert (ours is None and theirs is None) or ours.equal(theirs)
        for ours, theirs in zip(before.instances or (), result.instances or (), strict=True):
            assert ours.mask.equal(theirs.mask)
            assert ours[1:] == theirs[1:]


@pytest.mark.slow
def test_the_package_stays_light():
    program = (
        "import sys, pem_lightning; assert not {'hydra', 'lightning', 'cv2', 'albumentations'} & set(sys.modules); "
        "from pem_lightning import Predictor; assert Predictor is pem_lightning.Predictor"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(AttributeError, match="Predictr"):
        pem_lightning.Predictr  # noqa: B018
