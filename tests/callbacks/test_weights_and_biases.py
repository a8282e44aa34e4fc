import numpy as np
import pytest
import torch
import wandb

from pem_lightning.callbacks.shown import shown
from pem_lightning.callbacks.weights_and_biases import WeightsAndBiases, _boxes, _masks


@pytest.mark.parametrize(
    ("environment", "netrc", "offline"),
    [
        ({}, "", True),
        ({"WANDB_API_KEY": "k" * 40}, "", False),
        ({"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "offline"}, "", True),
        ({}, "machine api.wandb.ai login user password secret", False),
        ({}, "machine api.forge.coreweave.com login user password secret", False),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password secret", True),
    ],
)
def test_is_offline_unless_logged_in(environment, netrc, offline, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    logger = WeightsAndBiases(tmp_path, project="toy")
    assert logger._offline is offline
    assert logger.closing_words() is None  # nothing was tracked yet
    monkeypatch.delenv("WANDB_MODE", raising=False)


def test_without_a_way_to_the_server_the_run_is_kept_offline(tmp_path, monkeypatch, caplog):
    def init(**settings):
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("no such host")
        return "run"

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "online")  # is changed, and restored after the test
    logger = WeightsAndBiases(tmp_path, offline=False, project="toy", tags=["a"])
    assert logger.experiment == logger.experiment == "run"
    assert logger._offline
    (message,) = caplog.messages
    assert "KEPT OFFLINE" in message
    assert "no such host" in message


def test_a_resumed_run_keeps_its_id(tmp_path):
    for folder in ("run-20260101_000000-old", "offline-run-20260202_000000-new", "offline-run-20260202_000000-new-1"):
        name = folder.split("-")[-1 if folder[-1] != "1" else -2]
        (tmp_path / "wandb" / folder).mkdir(parents=True)
        (tmp_path / "wandb" / folder / f"run-{name}.wandb").touch()
    assert WeightsAndBiases(tmp_path, resumed_from="last.ckpt").version == "new"
    assert WeightsAndBiases(tmp_path, resumed_from="last.ckpt", id="own").version == "own"
    assert WeightsAndBiases(tmp_path).version is None  # a new run in an old folder
    assert WeightsAndBiases(tmp_path / "empty", resumed_from="last.ckpt").version is None


def test_masks_and_boxes(sample, result, info):
    things = result._replace(segments=(result.segments[0]._replace(score=0.75), result.segments[1]))
    prediction = shown(sample, things, info).prediction
    classes, segments = _masks(prediction)
    assert classes.dtype == segments.dtype == np.uint8
    assert (classes[:, :15] == 1).all()  # the first class; 0 is none
    assert (classes[:, 15:] == 2).all()
    assert np.array_equal(segments, sample.panoptic.numpy())
    (box,) = _boxes(prediction, info)
    assert box["position"] == {"minX": 0, "minY": 0, "maxX": 15, "maxY": 20}
    assert (box["class_id"], box["box_caption"], box["scores"]) == (1, "person", {"score": 0.75})


def test_more_segments_than_a_mask_can_number(sample):
    ids = torch.arange(1, 601, dtype=torch.int32).reshape(20, 30)
    segments = tuple(sample.segments[0]._replace(id=i) for i in range(1, 601))
    classes, numbers = _masks((ids, segments))
    assert (classes == 1).all()
    assert numbers.max() == 255
    assert (numbers.ravel()[255:] == 0).all()
