"""Files are read back by the official readers' own rules, or by the tools themselves."""

import contextlib
import io
import json
import math
import time
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pem_lightning.callbacks import Results, SavePredictions
from pem_lightning.callbacks.results import class_table, summary
from pem_lightning.data import ADE20K, CachedDataset, CityscapesDataset, CocoPanopticDataset
from pem_lightning.files import rgb_to_id
from pem_lightning.inference.postprocess import Instance, Result
from pem_lightning.metrics.evaluator import Evaluator
from pem_lightning.metrics.panoptic_files import evaluate_panoptic_files
from pem_lightning.types import Batch, UserError


def test_table_and_summary(evaluation, info):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(class_table(evaluation, info))
    text = console.export_text()
    assert "person" in text
    assert "100.0" in text
    train = next(line for line in text.splitlines() if "train" in line)
    assert train.count(" - ") == 4  # PQ, SQ, RQ, IoU of a class that does not occur
    assert "PQ 100.0" in summary(evaluation)
    assert "mIoU 100.0" in summary(evaluation)
    scalars = evaluation.scalars()
    assert scalars["val/PQ_things"] == scalars["val/mIoU"] == 100
    assert len(scalars) == 11
    assert math.isnan(evaluation.per_class(info)[2]["PQ"])


def test_table_and_summary_of_the_instance_task(sample, info):
    evaluator = Evaluator(info, "instance")
    evaluator.update(Result(instances=(Instance(sample.panoptic == 1, 0, 0.9),)), sample)
    evaluation = evaluator.compute()
    assert summary(evaluation).splitlines()[0].split() == ["objects", "AP", "100.0", "AP50", "100.0", "AP75", "100.0"]
    assert "large        AP -" in summary(evaluation)
    assert [row["class"] for row in evaluation.per_class(info)] == ["person", "train"]  # things only
    assert class_table(evaluation, info).row_count == 2
    assert list(evaluation.scalars()) == ["val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl"]


def test_results_are_written_without_nan(tmp_path, evaluation, module, trainer, capsys):
    module.evaluation = evaluation
    Results(tmp_path).on_fit_end(trainer, module)
    metrics = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["step"] == 5
    assert metrics["val/PQ"] == 100
    assert metrics["per_class"][2]["IoU"] is None
    assert (tmp_path / "per_class.csv").read_text().splitlines()[0] == "class,kind,PQ,SQ,RQ,TP,FP,FN,IoU"
    assert "numbers" in capsys.readouterr().out
    module.evaluation = None  # stopped before the first validation
    Results(tmp_path / "never").on_fit_end(trainer, module)
    assert not (tmp_path / "never").exists()


def test_the_run_summary_says_how_it_went_and_how_to_go_on(tmp_path, evaluation, module, trainer, capsys):
    module.evaluation = evaluation
    module.record = {"config": {}, "overrides": ["task=panoptic", "recipe.max_steps=10", "resume=old"]}
    best = ModelCheckpoint(monitor="val/PQ")
    best.best_model_score = torch.tensor(60.0)
    trainer.checkpoint_callbacks = [best]
    trainer.callback_metrics = {"train/images_per_second": torch.tensor(12.34)}
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("best", "last"):
        (folder / f"{name}.ckpt").touch()
    callback = Results(tmp_path)
    callback.on_train_start(trainer, module)
    trainer.global_step = 7
    callback.on_fit_end(trainer, module)
    said = capsys.readouterr().out
    assert "time         0:00:00 for 2 steps\n" in said
    assert "throughput   12.3 images/s at the end\n" in said
    assert "best         PQ 60.0\n" in said
    assert f"go on        python train.py task=panoptic recipe.max_steps=10 resume={folder}/last.ckpt\n" in said
    assert f"python evaluate.py checkpoint={folder}/best.ckpt\n" in said
    assert f"python predict.py checkpoint={folder}/best.ckpt input=IMAGE\n" in said
    trainer.global_step = 10
    callback.on_fit_end(trainer, module)
    longer = f"train longer python train.py task=panoptic recipe.max_steps=20 resume={folder}/last.ckpt\n"
    assert longer in capsys.readouterr().out


def test_tensorboard_forgets_the_steps_that_a_resumed_run_repeats(tmp_path, module, trainer, monkeypatch):
    now = time.time
    for begin, value in ((0, 1.0), (2, 2.0)):
        monkeypatch.setattr(time, "time", lambda begin=begin: now() + begin)  # files are read in the order of seconds
        logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False, filename_suffix=f".{begin}")
        trainer.loggers, trainer.global_step = [logger], begin
        Results(tmp_path).on_train_start(trainer, module)
        for step in range(begin, begin + 4):
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0), (5, 2.0)]


@pytest.fixture
def save(trainer, module):
    """Writes images dealt out to a number of processes: (directory, task, samples, results)."""

    def run(directory, task, samples, results, processes=1, suffix=""):
        trainer.datamodule = Mock(val_dataset=SimpleNamespace(image_ids={"a": 17, "b": 4}, prediction_suffix=suffix))
        module.inference.task = task
        callbacks = [SavePredictions(directory) for _ in range(processes)]
        for rank, callback in enumerate(callbacks):
            callback.on_validation_start(trainer, module)
            for sample, result in list(zip(samples, results, strict=True))[rank::processes]:
                batch = Batch([sample.image], [], [sample])
                callback.on_validation_batch_end(trainer, module, {"results": [result]}, batch, 0)
        entries = [callback._entries for callback in callbacks]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pem_lightning.callbacks.results.all_gather", lambda _: entries)
            for rank, callback in reversed(list(enumerate(callbacks))):
                trainer.is_global_zero = rank == 0
                callback.on_validation_end(trainer, module)

    return run


@pytest.mark.parametrize("processes", [1, 2])
def test_panoptic_predictions(save, tmp_path, sample, result, processes):
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


def test_official_files_written_again_are_perfect(trainer, module, tmp_path, reference, validate):
    """Two annotated photographs of COCO as predictions: ids of images, segments and categories are COCO's own."""
    folder = reference / "panoptic_quality" / "coco_sample"
    dataset = CocoPanopticDataset(folder / "panoptic.json", folder / "images")
    trainer.datamodule = SimpleNamespace(val_dataset=CachedDataset(dataset, tmp_path / "cache"))
    module.info = dataset.info
    samples = list(trainer.datamodule.val_dataset)
    validate(SavePredictions(tmp_path), samples, [Result(panoptic=s.panoptic, segments=s.segments) for s in samples])
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


def test_class_maps_have_official_ids_and_the_servers_names(save, tmp_path, sample, result, module):
    save(tmp_path, "semantic", [sample], [Result(result.semantic)], suffix=CityscapesDataset.prediction_suffix)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a_leftImg8bit.png"]
    saved = np.array(Image.open(tmp_path / "semantic" / "a_leftImg8bit.png"))
    assert saved.dtype == np.uint8
    assert set(np.unique(saved[:, :15])) == {24}
    assert set(np.unique(saved[:, 15:])) == {23}
    module.info = ADE20K
    classes = torch.arange(600, dtype=torch.int32).reshape(20, 30) % 150
    save(tmp_path, "semantic", [sample], [Result(classes)])
    assert np.array_equal(np.array(Image.open(tmp_path / "semantic" / "a.png")), classes.numpy() + 1)


def test_a_folder_that_cannot_be_written_is_said_before_the_work(trainer, module, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        SavePredictions(tmp_path / "file" / "below").on_validation_start(trainer, module)
