from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import seed_everything

from pem_lightning.data.cityscapes import CityscapesDataModule
from pem_lightning.data.datamodule import collate_eval, collate_train
from pem_lightning.data.transforms import EvalTransform, TrainTransform
from pem_lightning.types import Batch, Sample, Segment, UserError


@pytest.fixture
def root(tmp_path, write_sample):
    """Five training and three validation images of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            ids = rng.choice(np.array([0, 7, 11, 24, 24000, 26000], np.uint16), (24 + 2 * i, 40))
            write_sample(f"ulm_{i:06d}_000000", ids, split)
    return tmp_path


def make_data(root, **arguments) -> CityscapesDataModule:
    defaults = {"batch_size": 2, "num_workers": 0, "train_transform": TrainTransform((16, 24), [20, 24, 28], None)}
    data = CityscapesDataModule(root, **(defaults | arguments))
    data.prepare_data()
    data.setup("fit")
    return data


def train_batches(root, seed=7, epochs=1, **arguments) -> list[Batch]:
    seed_everything(seed, workers=True, verbose=False)
    loader = make_data(root, **arguments).train_dataloader()
    assert loader.persistent_workers == (arguments.get("num_workers", 0) > 0)
    return [batch for _ in range(epochs) for batch in loader]


def same(a: Batch, b: Batch) -> bool:
    return (
        all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        and all(torch.equal(x.labels, y.labels) for x, y in zip(a.targets, b.targets, strict=True))
        and all(torch.equal(x.masks, y.masks) for x, y in zip(a.targets, b.targets, strict=True))
    )


def all_same(first: list[Batch], second: list[Batch]) -> bool:
    return all(same(a, b) for a, b in zip(first, second, strict=True))


def test_collation():
    samples = [
        Sample(torch.full((3, h, w), i).byte(), torch.full((h, w), 7).int(), (Segment(7, 0, False),), f"{i}")
        for i, (h, w) in enumerate([(4, 5), (6, 3)])
    ]
    train, evaluate = collate_train(samples, "panoptic"), collate_eval(samples)
    assert [tuple(image.shape) for image in train.images] == [(3, 4, 5), (3, 6, 3)]
    assert [tuple(target.masks.shape) for target in train.targets] == [(1, 4, 5), (1, 6, 3)]
    assert (train.samples, train.names) == ([], ("0", "1"))
    assert (evaluate.targets, evaluate.samples) == ([], samples)
    assert all(image is sample.image for image, sample in zip(evaluate.images, samples, strict=True))


def test_loaders(root):
    data = make_data(root, eval_batch_size=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 2  # five images, the last is dropped
    for batch in batches:
        assert len(batch.images) == len(batch.targets) == 2
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert image.dtype == torch.uint8
            assert image.shape[1:] == target.masks.shape[1:] == (16, 24)
    batches = list(data.val_dataloader())
    samples = [sample for batch in batches for sample in batch.samples]
    assert [sample.name for sample in samples] == [f"ulm_{i:06d}_000000" for i in range(3)]
    assert [tuple(sample.panoptic.shape) for sample in samples] == [(24, 40), (26, 40), (28, 40)]
    assert [len(batch.images) for batch in batches] == [2, 1]
    data = make_data(root, eval_transform=EvalTransform(12))
    assert next(iter(data.val_dataloader())).images[0].shape == (3, 12, 20)


@pytest.mark.parametrize(
    ("task", "classes"), [("panoptic", {0, 2, 11, 13}), ("semantic", {0, 2, 11, 13}), ("instance", {11, 13})]
)
def test_task_decides_the_targets(root, task, classes):
    labels = [t.labels for batch in make_data(root, task=task).train_dataloader() for t in batch.targets]
    assert set(torch.cat(labels).tolist()) == classes


def test_batches_do_not_depend_on_the_number_of_workers(root):
    alone = train_batches(root, epochs=2)
    assert len(alone) == 4
    assert not same(alone[0], alone[2])
    assert not same(alone[0], train_batches(root, seed=8)[0])
    for num_workers in (0, 2):
        assert all_same(alone, train_batches(root, epochs=2, num_workers=num_workers))


def test_workers_and_epochs_draw_differently(root):
    source = {path: path.read_bytes() for path in root.rglob("train/ulm/ulm_000000*")}
    for path in root.rglob("train/ulm/*"):  # every image alike, so that batches differ by augmentation alone
        kind = path.name.split("_", 3)[3]
        path.write_bytes(next(data for other, data in source.items() if other.name.endswith(kind)))
    images = [batch.images[0] for batch in train_batches(root, epochs=2, batch_size=1, num_workers=2)]
    assert len(images) == 10
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])


def test_what_training_draws_does_not_change_the_data(root):
    seed_everything(7, workers=True, verbose=False)
    batches = []
    for batch in make_data(root).train_dataloader():
        batches.append(batch)
        torch.rand(3)
    assert all_same(train_batches(root), batches)


def test_validation_needs_no_training_images(root):
    for path in root.rglob("train/ulm/*"):
        path.unlink()
    data = CityscapesDataModule(root, num_workers=0)
    data.setup("validate")
    assert len(data.val_dataloader()) == 3
    with pytest.raises(UserError, match="has no files"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size and eval_batch_size must be at least 1"),
        ({"eval_batch_size": 0}, "batch_size and eval_batch_size must be at least 1"),
        ({"num_workers": -1}, "num_workers at least 0"),
        ({"batch_size": 8}, r"5 training images make no batch of 8: lower recipe\.global_batch_size"),
    ],
)
def test_refused_arguments(root, arguments, message):
    with pytest.raises(UserError, match=message):
        make_data(root, **arguments)


def on_device(data: CityscapesDataModule, rank: int, world_size: int) -> CityscapesDataModule:
    """As Lightning attaches a trainer in each process; the first process's seed is sent to all."""
    strategy = SimpleNamespace(broadcast=lambda seed: 7)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy, max_epochs=1)
    return data


def test_devices_train_on_disjoint_parts_of_the_same_batches(root):
    whole = train_batches(root, batch_size=4)
    parts = []
    for rank in range(2):
        seed_everything(100 + rank, workers=True, verbose=False)  # devices that were not seeded alike
        parts.append(list(on_device(make_data(root, batch_size=2), rank, 2).train_dataloader()))
    for batch, first, second in zip(whole, *parts, strict=True):
        together = [image for pair in zip(first.images, second.images, strict=True) for image in pair]
        assert all(torch.equal(a, b) for a, b in zip(batch.images, together, strict=True))


def test_devices_share_validation_without_repetition(root):
    loaders = [on_device(make_data(root), rank, 2).val_dataloader() for rank in range(2)]
    names = [sample.name for loader in loaders for batch in loader for sample in batch.samples]
    assert sorted(names) == [f"ulm_{i:06d}_000000" for i in range(3)]
    with pytest.raises(UserError, match=r"3 validation images are too few for 4 devices: lower trainer\.devices"):
        on_device(make_data(root), 0, 4).val_dataloader()


@pytest.mark.parametrize("keep", [True, False])
def test_segments_that_were_cropped_away(root, keep):
    data = make_data(root, train_transform=TrainTransform((3, 3), [24], None), keep_empty_targets=keep)
    masks = [mask for batch in data.train_dataloader() for target in batch.targets for mask in target.masks]
    assert any(not mask.any() for mask in masks) == keep


def test_a_cache_changes_nothing_but_the_speed(root, tmp_path):
    cached = {"cache": tmp_path / "cache", "num_workers": 2}
    assert all_same(train_batches(root), train_batches(root, **cached))
    val, cached_val = (list(make_data(root, **options).val_dataloader()) for options in ({}, cached))
    for a, b in zip(val, cached_val, strict=True):
        assert same(a, b)
        assert torch.equal(a.samples[0].panoptic, b.samples[0].panoptic)
    assert len(list((tmp_path / "cache").glob("*/*.json"))) == 8


class Resident:
    """Reports the private memory of the worker that loads, in MiB, as a sample's name."""

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, sample):
        pages = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        return self.transform(sample)._replace(name=str(int(pages["Private_Dirty:"]) / 1024))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
@pytest.mark.parametrize("cached", [False, True])
def test_memory_of_a_worker_stays_flat(root, tmp_path, cached):
    transform = Resident(TrainTransform((256, 256), [256, 300, 400], None))
    cache = tmp_path / "cache" if cached else None
    loader = make_data(root, num_workers=1, eval_transform=transform, cache=cache).val_dataloader()
    loader.multiprocessing_context = "spawn"  # a forked worker copies pages of earlier tests, little by little
    epochs = [max(float(sample.name) for batch in loader for sample in batch.samples) for _ in range(24)]
    assert max(epochs[12:]) < max(epochs[4:12]) + 4


def test_training_batches_wait_in_the_hosts_memory(root):
    """Their micro-batches go to the device one by one; others go there whole."""
    data = make_data(root)
    batch = next(iter(data.val_dataloader()))
    for training in (True, False):
        data.trainer = SimpleNamespace(training=training)
        moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
        assert moved.images[0].device.type == ("cpu" if training else "meta")
