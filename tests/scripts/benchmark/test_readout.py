"""What limits a trained network: the readout of its classes, masks and features."""

import numpy as np
import pytest
import torch

from pem_lightning.types import IGNORE_INDEX
from scripts.benchmark import readout
from scripts.benchmark.__main__ import main
from tests.data.damage import save
from tests.jobs import call
from tests.scripts.benchmark.test_camvid import TINY


def test_the_best_query_of_a_class_is_that_of_the_largest_iou():
    truth = torch.tensor([[0, 0, 2, 2], [0, 0, 2, IGNORE_INDEX]])
    masks = torch.zeros(3, 2, 4, dtype=torch.bool)
    masks[0, :, :2] = True  # class 0, exactly
    masks[1] = True  # of both, loosely
    masks[2, 0, 2:] = True  # two of class 2's three pixels
    expected = [[1, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert readout.best_queries(masks, truth, 3).tolist() == expected


def test_a_linear_classifier_finds_what_is_linear(monkeypatch):
    monkeypatch.setattr(readout, "STEPS", 500)
    torch.manual_seed(0)
    features = 50 * torch.randn(4000, 6) + 10
    labels = (features @ torch.randn(6, 4)).argmax(1)
    classify = readout.fit_linear(features, labels, 4)
    assert (classify(features.view(40, 100, 6)).argmax(-1).flatten() == labels).float().mean() > 0.9


@pytest.mark.slow
def test_a_trained_network(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readout, "STEPS", 5)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for number in range(2):
            save(tmp_path / split / f"{number}.png", rng.integers(0, 256, (36, 50, 3), np.uint8))
            save(tmp_path / f"{split}annot" / f"{number}.png", rng.integers(0, 12, (36, 50), np.uint8))
    steps = ("recipe.max_steps=1", "recipe.global_batch_size=2", "dataset.num_workers=0", "hydra.run.dir=run")
    data = ("dataset=camvid", f"dataset.root={tmp_path}", "trainer=cpu")
    assert call("train", *data, *TINY, *steps, "callbacks.panels=null") == 0
    arguments = ["readout", "--checkpoint", "run/checkpoints/last.ckpt", "--root", str(tmp_path)]
    assert main([*arguments, "--images", "2", "--pixels", "50"]) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [row.split("|")[1].strip() for row in rows] == list(readout.WAYS)
    whole = float((tmp_path / "run" / "metrics.json").read_text().split('"val/mIoU": ')[1].split(",")[0])
    assert float(rows[0].split("|")[2]) == pytest.approx(whole, abs=0.06)


@pytest.mark.slow
def test_another_task_is_refused(tmp_path, monkeypatch, capsys):
    from tests.deploy.conftest import write_tiny_checkpoint

    path = write_tiny_checkpoint(tmp_path / "tiny.ckpt")
    assert main(["readout", "--checkpoint", str(path), "--root", "anywhere"]) == 2
    assert "is of task=panoptic: readout is for semantic segmentation" in capsys.readouterr().err
