"""What missing and broken files do, by themselves and in training."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pem_lightning.cli import launch as run
from pem_lightning.data.cityscapes import CITYSCAPES, CityscapesDataModule
from pem_lightning.data.dataset import SegmentationDataset
from pem_lightning.data.synthetic import generate_synthetic
from pem_lightning.data.transforms import TrainTransform
from pem_lightning.types import Sample, UserError


class Numbers(SegmentationDataset):
    """Items 0 to 4, whose image is their number; some are broken."""

    def __init__(self, broken=(), problems=(), **arguments):
        super().__init__(CITYSCAPES, [f"item{i}" for i in range(5)], problems, **arguments)
        self.broken = broken

    def files(self, index):
        return (Path(f"item{index}.png"),)

    def read(self, index):
        if index in self.broken:
            raise UserError(f"item{index}.png is broken: mend it")
        return Sample(torch.full((3, 2, 2), index, dtype=torch.uint8), torch.zeros(2, 2).int(), (), self.names[index])


def test_items_in_order():
    dataset = Numbers()
    assert len(dataset) == 5
    assert [sample.name for sample in dataset] == dataset.names
    assert dataset[-1].name == "item4"
    for index in (5, -6):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_transform_is_applied_to_what_is_read():
    assert Numbers(transform=lambda s: s._replace(name=s.name.upper()))[1].name == "ITEM1"


def test_stop_raises_the_first_problem_and_counts_the_others():
    with pytest.raises(UserError, match=r"^a\.png has no image: copy it \(and 2 more such problems\)$"):
        Numbers(problems=["a.png has no image: copy it", "b", "c"])
    with pytest.raises(UserError, match=r"^a\.png has no image: copy it$"):
        Numbers(problems=["a.png has no image: copy it"])


def test_stop_names_the_broken_file():
    dataset = Numbers(broken={2})
    with pytest.raises(UserError, match=r"item2\.png is broken: mend it"):
        dataset[2]


def test_skip_logs_problems_and_goes_on(caplog):
    with caplog.at_level(logging.WARNING):
        dataset = Numbers(problems=["a.png has no image: copy it"], on_error="skip")
    assert "left out: a.png has no image: copy it" in caplog.text
    assert dataset[0].name == "item0"


def test_skip_takes_the_next_readable_item_and_logs(caplog):
    dataset = Numbers(broken={0, 3, 4}, on_error="skip")
    with caplog.at_level(logging.WARNING):
        assert [dataset[i].name for i in range(5)] == ["item1", "item1", "item2", "item1", "item1"]
        assert dataset[-1].name == "item1"
    assert "skipped: item3.png is broken: mend it" in caplog.text
    assert "skipped: item4.png is broken: mend it" in caplog.text


def test_skip_does_not_hide_that_nothing_can_be_read():
    with pytest.raises(UserError, match="none of the 5 items can be read"):
        Numbers(broken=range(5), on_error="skip")[3]


def test_skip_hides_no_bug():
    def buggy(sample):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Numbers(on_error="skip", transform=buggy)[0]


def test_collect_keeps_problems_and_raises_on_reading():
    dataset = Numbers(broken={1}, problems=["a", "b"], on_error="collect")
    assert dataset.problems == ["a", "b"]
    with pytest.raises(UserError, match="item1"):
        dataset[1]


@pytest.fixture
def broken(tmp_path):
    """Drawn street scenes, one photograph of which is cut short; returns root and that file."""
    root = generate_synthetic(tmp_path / "drawn", train=4, val=1, height=32, width=64)
    path = sorted((root / "leftImg8bit" / "train").rglob("*.png"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    return root, path


def load(root, on_error):
    data = CityscapesDataModule(
        root,
        batch_size=1,
        train_transform=TrainTransform((32, 64), [32], None, color_jitter=False, flip=0.0),
        num_workers=1,
        on_error=on_error,
    )
    data.setup("fit")
    return list(data.train_dataloader())


def test_workers_pass_the_broken_file_on(broken):
    root, path = broken
    with pytest.raises(UserError, match=path.name):
        load(root, "stop")


def test_workers_replace_the_broken_file(broken):
    root, _ = broken
    batches = load(root, "skip")
    images = np.stack([batch.images[0].numpy() for batch in batches])
    assert len(images) == 4
    assert len(np.unique(images, axis=0)) == 3  # the third one stands in for the second


def train(root, folder, *arguments):
    """Train a step by the entry point, in this process; returns the exit code."""
    before = sys.argv
    sys.argv = [
        "train.py",
        "dataset=cityscapes",
        f"dataset.root={root}",
        "dataset.num_workers=1",
        "backbone=resnet18",
        "backbone.norm=batch",
        "network.num_layers=1",
        "network.num_queries=5",
        "recipe.global_batch_size=4",
        "recipe.num_points=16",
        "recipe.max_steps=1",
        "recipe.val_interval=1",
        "recipe.train_transform.crop_size=[32,64]",
        "recipe.train_transform.shortest_edges=[32]",
        "trainer=cpu",
        "logger=none",
        "callbacks=none",
        f"hydra.run.dir={folder}",
        *arguments,
    ]
    try:
        run.main("train")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


@pytest.mark.slow
def test_training_stops_with_name_and_cure(broken, tmp_path, capfd):
    root, path = broken
    assert train(root, tmp_path / "run") == 2
    printed = capfd.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(path) in errors[0]
    assert "unzip" in errors[0]
    assert "Traceback" not in printed.err + printed.out


@pytest.mark.slow
def test_training_skips_by_config(broken, tmp_path, capfd):
    root, path = broken
    assert train(root, tmp_path / "run", "dataset.on_error=skip") == 0
    printed = capfd.readouterr()
    assert f"skipped: cannot read {path}" in printed.err + printed.out
