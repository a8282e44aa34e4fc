"""The keys for small data sets, through train.py: frozen backbone, early stopping, class weights, warm-up."""

import json
import re
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.cli.build import build_module, weights_by_class
from pem_lightning.data import CITYSCAPES
from pem_lightning.types import UserError
from tests.jobs import TINIEST, call, compose

pytestmark = pytest.mark.slow

STEPS = ("recipe.max_steps=4", "recipe.val_interval=2", "recipe.checkpoint_interval=1")
LAST = "checkpoints/last.ckpt"


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("small"))
        yield


def train(folder, *arguments):
    assert call("train", *TINIEST, *STEPS, f"hydra.run.dir={folder}", *arguments) == 0
    return read_checkpoint(f"{folder}/{LAST}")


def test_a_frozen_backbone_keeps_weights_and_statistics(capsys):
    start = train("start", "recipe.max_steps=1", "recipe.val_interval=1")
    weights = f"weights=start/{LAST}"
    frozen = train("frozen", "recipe.freeze=backbone", weights)
    backbone = [name for name in start.network if name.startswith("backbone.")]
    assert any("running_mean" in name for name in backbone)
    assert all(torch.equal(frozen.network[name], start.network[name]) for name in backbone)
    assert sum(not torch.equal(value, start.network[name]) for name, value in frozen.network.items()) > len(backbone)
    groups = torch.load(f"frozen/{LAST}", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert {group["name"].removesuffix("_no_decay") for group in groups} == {"decoders"}
    # Resumed after a validation, it ends with the same bits.
    train("cut", "recipe.freeze=backbone", weights, "trainer.max_steps=3")
    assert call("train", f"resume=cut/{LAST}", "trainer.max_steps=4") == 0
    resumed = read_checkpoint(f"cut/{LAST}").network
    assert all(torch.equal(value, resumed[name]) for name, value in frozen.network.items())
    capsys.readouterr()
    assert call("train", f"resume=cut/{LAST}", "trainer.max_steps=5", "recipe.freeze=null") == 2
    assert "was trained with recipe.freeze=backbone: go on with that" in capsys.readouterr().err
    assert "keeps random weights" not in Path("frozen/run.log").read_text()
    assert call("train", *TINIEST, "recipe.freeze=decoder") == 2
    assert "recipe.freeze=decoder: choose backbone" in capsys.readouterr().err


def test_a_training_stops_when_it_gets_no_better(capsys):
    """With a learning rate of nearly 0 no validation is better than the first; a resumed run goes on counting."""
    stop = ("callbacks.early_stopping.patience=2", "recipe.optimizer.lr=1e-30", "backbone.norm=frozen")
    many = ("recipe.max_steps=40", "recipe.val_interval=1")
    assert train("early_cut", *stop, *many, "trainer.max_steps=2").step == 2
    assert call("train", f"resume=early_cut/{LAST}", "trainer.max_steps=40") == 0
    assert read_checkpoint(f"early_cut/{LAST}").step == 3
    assert json.loads(Path("early_cut/metrics.json").read_text())["step"] == 3
    assert call("train", f"resume=early_cut/{LAST}", "trainer.max_steps=40") == 0  # nothing to do
    assert read_checkpoint(f"early_cut/{LAST}").step == 3
    patient = "callbacks.early_stopping.patience=3"
    assert call("train", f"resume=early_cut/{LAST}", "trainer.max_steps=40", patient) == 0
    assert read_checkpoint(f"early_cut/{LAST}").step == 4
    capsys.readouterr()
    assert call("train", *TINIEST, "callbacks.early_stopping.patience=0") == 2
    assert "callbacks.early_stopping.patience=0: choose a number of validations" in capsys.readouterr().err


def test_class_weights(capsys):
    arguments = ("recipe.max_steps=1", "recipe.val_interval=1", "recipe.class_weights={road: 5, traffic light: 0.5}")
    checkpoint = train("weighted", *arguments)
    criterion = build_module(OmegaConf.create(checkpoint.config), CITYSCAPES).criterion
    expected = [1.0] * 20
    expected[0], expected[6], expected[19] = 5.0, 0.5, 0.1
    assert criterion.no_object_weighting.tolist() == pytest.approx(expected)
    capsys.readouterr()
    assert call("train", *TINIEST, "recipe.class_weights={rod:5}") == 2
    assert "recipe.class_weights: there is no class rod (did you mean road?)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"road": -5}, "recipe.class_weights: road has the weight -5: give a number above 0"),
        ({"road": "much"}, "recipe.class_weights: road has the weight much: give a number above 0"),
        ({"road": True}, "recipe.class_weights: road has the weight True"),
        ("auto", "recipe.class_weights=auto: give weights by class name, e.g. {road: 2}"),
    ],
)
def test_wrong_class_weights(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        weights_by_class(given, CITYSCAPES)


def test_warmup_is_one_key():
    cfg = compose("train", "recipe.warmup_steps=2", "trainer=cpu")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = instantiate(cfg.recipe.schedule)(optimizer)
    rates = [schedule.lr_lambdas[0](step) for step in range(4)]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[0] < rates[1] < rates[2] > rates[3]
    assert compose("train").recipe.schedule.warmup_iterations == 0
