"""Read back by the official readers' own rules, or by the tools themselves."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from pem_lightning.callbacks import SavePredictions
from pem_lightning.data import ADE20K, CachedDataset, CityscapesDataset, CocoPanopticDataset
from pem_lightning.files import rgb_to_id
from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import Batch, UserError

IDS = {"a": 17, "b": 4}


@pytest.fixture
def save(trainer, module):
    """Runs the callback over images, dealt out to a number of processes: (directory, task, samples, results)."""

    def run(directory, task, samples, results, processes=1, suffix=""):
        dataset = SimpleNamespace(image_ids=IDS, prediction_suffix=suffix)
        trainer.datamodule = SimpleNamespace(val_dataset=dataset)
        trainer.world_size = processes
        module.inference.task = task
        callbacks = [SavePredictions(directory) for _ in range(processes)]
        for rank, callback in enumerate(callbacks):
            trainer.global_rank = rank
            callback.on_validation_start(trainer, module)
            for sample, result in list(zip(samples, results, strict=True))[rank::processes]:
                batch = Batch([sample.image], [], [sample])
                callback.on_validation_batch_end(trainer, module, {"results": [result]}, batch, 0)
        for rank, callback in reversed(list(enumerate(callbacks))):  # the first process is the last
            trainer.is_global_zero = rank == 0
            callback.on_validation_end(trainer, module)

    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_panoptic(save, tmp_path, sample, result, processes):
    empty = result._replace(panoptic=torch.zeros_like(result.panoptic), segments=())
    samples = [sample._replace(name=name) for name in ("a", "b", "c")]
    save(tmp_path, "panoptic", samples, [result, empty, result], processes)
    annotations = json.loads((tmp_path / "panoptic.json").read_text())["annotations"]
    assert [a["image_id"] for a in annotations] == [17, 4, "c"]  # the data set's own ids, in its order
    assert [a["file_name"] for a in annotations] == ["a.png", "b.png", "c.png"]
    assert annotations[1]["segments_info"] == []
    found = [(s["id"], s["category_id"], s["area"]) for s in annotations[0]["segments_info"]]
    assert found == [(1, 24, 300), (2, 23, 300)]
    ids = rgb_to_id(np.array(Image.open(tmp_path / "panoptic" / "a.png")))
    assert np.array_equal(ids, result.panoptic.numpy())
    assert not list(tmp_path.glob("*.jsonl"))


def test_official_files_written_again_are_perfect(trainer, module, tmp_path, reference):
    """Two annotated photographs of COCO as predictions: ids of images, segments and categories are COCO's own."""
    folder = reference / "panoptic_quality" / "coco_sample"
    dataset = CocoPanopticDataset(folder / "panoptic.json", folder / "images")
    trainer.datamodule = SimpleNamespace(val_dataset=CachedDataset(dataset, tmp_path / "cache"))
    module.info = dataset.info
    callback = SavePredictions(tmp_path)
    callback.on_validation_start(trainer, module)
    for sample in trainer.datamodule.val_dataset:
        result = Result(panoptic=sample.panoptic, segments=sample.segments)
        batch = Batch([sample.image], [], [sample])
        callback.on_validation_batch_end(trainer, module, {"results": [result]}, batch, 0)
    callback.on_validation_end(trainer, module)
    quality = evaluate_panoptic_files(folder / "panoptic.json", tmp_path / "panoptic.json").quality
    assert quality.all.pq == 1
    assert quality.true_positives.sum() > 10


@pytest.mark.parametrize("processes", [1, 2])
def test_instances_are_read_by_pycocotools(save, tmp_path, sample, processes):
    masks = [sample.panoptic == 1, sample.panoptic > 0]
    results = [
        Result(instances=(Instance(masks[0], 0, 0.75), Instance(masks[1], 2, 0.5))),
        Result(),
        Result(instances=(Instance(masks[1], 0, 0.25),)),
    ]
    samples = [sample._replace(name=name) for name in ("b", "c", "a")]
    save(tmp_path, "instance", samples, results, processes)
    truth = COCO()
    sizes = [{"id": i, "height": 20, "width": 30} for i in (17, 4)]
    truth.dataset = {"images": sizes, "annotations": [], "categories": []}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        loaded = truth.loadRes(str(tmp_path / "instances.json"))
    described = [(a["image_id"], a["category_id"], a["score"]) for a in loaded.dataset["annotations"]]
    assert described == [(4, 24, 0.75), (4, 31, 0.5), (17, 24, 0.25)]
    assert np.array_equal(loaded.annToMask(loaded.dataset["annotations"][0]), masks[0].numpy())


def test_class_maps_have_official_ids_and_the_servers_names(save, tmp_path, sample, result):
    save(tmp_path, "semantic", [sample], [Result(result.semantic)], suffix=CityscapesDataset.prediction_suffix)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a_leftImg8bit.png"]
    saved = np.array(Image.open(tmp_path / "semantic" / "a_leftImg8bit.png"))
    assert saved.dtype == np.uint8
    assert set(np.unique(saved[:, :15])) == {24}
    assert set(np.unique(saved[:, 15:])) == {23}


def test_ade20ks_class_maps_are_1_to_150(save, tmp_path, sample, module):
    module.info = ADE20K
    classes = torch.arange(600, dtype=torch.int32).reshape(20, 30) % 150
    save(tmp_path, "semantic", [sample], [Result(classes)])
    assert np.array_equal(np.array(Image.open(tmp_path / "semantic" / "a.png")), classes.numpy() + 1)


def test_no_folder_writes_nothing(save, tmp_path, sample, result, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(None, "panoptic", [sample], [result])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_keeps_what_it_had(trainer, module, tmp_path, sample, result):
    trainer.datamodule = SimpleNamespace(val_dataset=SimpleNamespace(image_ids={}, prediction_suffix=""))
    callback = SavePredictions(tmp_path)
    callback.on_validation_start(trainer, module)
    callback.on_validation_batch_end(trainer, module, {"results": [result]}, Batch([sample.image], [], [sample]), 0)
    assert (tmp_path / "panoptic" / "a.png").is_file()
    assert json.loads((tmp_path / "panoptic.part0.jsonl").read_text())["image_id"] == "a"
    assert not (tmp_path / "panoptic.json").exists()


def test_a_folder_that_cannot_be_written_is_said_before_the_work(trainer, module, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        SavePredictions(tmp_path / "file" / "below").on_validation_start(trainer, module)
