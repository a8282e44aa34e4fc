import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from lightning import LightningModule, Trainer
from torch import nn

from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.training.ema import EMA, average_weights
from pem_lightning.types import UserError
from tests.jobs import TINIEST, call
from tests.small_training import train


def numbers(folder):
    content = json.loads((Path(folder) / "metrics.json").read_text())
    return {name: value for name, value in content.items() if name.startswith("val/")}


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_a_decay_that_is_no_share_is_refused(decay):
    with pytest.raises(UserError, match=r"recipe\.ema_decay"):
        average_weights(decay)


def test_weights_and_statistics_follow_and_counters_are_taken_over():
    module = LightningModule()
    norm = module.norm = nn.BatchNorm1d(1)
    ema = EMA(0.15)
    ema.setup(Mock(spec=Trainer), module, "fit")
    weight, mean = 1.0, 0.0
    for step in range(1, 5):
        norm.weight.data.fill_(1.0 + step)
        norm.running_mean.fill_(-step)
        norm.num_batches_tracked.fill_(step)
        for _ in range(2):  # the second time, there was no step
            ema.on_train_batch_end(Mock(spec=Trainer, global_step=step), module, None, None, 0)
        decay = (0.1, 0.15, 0.15, 0.15)[step - 1]  # 1/10 keeps less than 0.15, 2/11 would keep more
        weight = decay * weight + (1 - decay) * (1.0 + step)
        mean = decay * mean + (1 - decay) * -step
        average = ema._average_model.module.norm
        assert average.weight.item() == pytest.approx(weight)
        assert average.running_mean.item() == pytest.approx(mean)
        assert average.num_batches_tracked.item() == step
    assert norm.weight.item() == 5


LIMITS = ("recipe.val_interval=2", "recipe.checkpoint_interval=2")


@pytest.fixture(scope="module")
def trained(work):
    """Folder of a run of four steps."""
    settings = ("recipe.max_steps=4", "recipe.ema_decay=0.2", "recipe.optimizer.lr=0.02")  # far enough in a few steps
    assert call("train", *TINIEST, *LIMITS, *settings, "hydra.run.dir=trained") == 0
    return work / "trained"


@pytest.mark.slow
def test_checkpoints_have_both_and_averaged_ones_are_validated(trained):
    checkpoint = read_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert checkpoint.raw.keys() == checkpoint.network.keys()
    names = [name for name, value in checkpoint.raw.items() if value.is_floating_point()]
    assert any(not torch.equal(checkpoint.raw[name], checkpoint.network[name]) for name in names)
    path = f"checkpoint={trained}/checkpoints/last.ckpt"
    assert call("evaluate", path, "hydra.run.dir=averaged") == 0
    assert numbers("averaged") == numbers(trained)
    assert "averaged weights" in next(Path("averaged").glob("*.log")).read_text()
    assert call("evaluate", path, "ema=false", "hydra.run.dir=raw") == 0
    assert numbers("raw") != numbers(trained)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints of three steps with an average: all of it, and weights alone."""
    _, trainer, _ = train(callbacks=[EMA(0.5)])
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    return tmp_path


def read(path):
    return torch.load(path, weights_only=True)


def test_checkpoints_of_weights_alone_have_the_average_as_well(saved):
    whole, weights = read(saved / "whole.ckpt"), read(saved / "weights.ckpt")
    torch.testing.assert_close(weights["state_dict"], whole["state_dict"], rtol=0, atol=0)
    assert "optimizer_states" not in weights


def test_a_resumed_training_may_end_or_begin_its_average(saved):
    """Without one it goes on with the last step's weights; one that had none begins with its weights."""
    module, trainer, _ = train(ckpt_path=saved / "whole.ckpt")
    torch.testing.assert_close(module.state_dict(), read(saved / "whole.ckpt")["current_model_state"], rtol=0, atol=0)
    trainer.save_checkpoint(saved / "off.ckpt")
    ema = EMA(0.5)
    train(steps=5, ckpt_path=saved / "off.ckpt", callbacks=[ema])
    assert ema.state_dict()["latest_update_step"] == 5
    assert ema._average_model.n_averaged == 2
