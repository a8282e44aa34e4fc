import pytest
import torch
from lightning import Callback

from pem_lightning.callbacks import NonFiniteLoss
from pem_lightning.types import UserError
from tests.small_training import train
from tests.training.test_module import fp16


class Poison(Callback):
    """Makes the loss of the second step NaN."""

    def on_train_start(self, trainer, pl_module):
        def poison(criterion, arguments, losses):
            return {k: v * (torch.nan if trainer.global_step == 1 else 1) for k, v in losses.items()}

        pl_module.criterion.register_forward_hook(poison)


def weights(module):
    return [p.clone() for p in module.network.parameters()]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_bad_step_changes_no_weights(tmp_path, mixed):
    guard = NonFiniteLoss(tmp_path, max_bad_steps=1)
    plugins = [[fp16()] if mixed else [] for _ in range(2)]
    module, trainer, losses = train(plugins[0], steps=2, callbacks=[guard, Poison()])
    assert losses[1] != losses[1]
    assert (guard.bad_steps, trainer.global_step) == (1, 2)
    first, _, _ = train(plugins[1], steps=1)
    assert all(torch.equal(a, b) for a, b in zip(weights(module), weights(first), strict=True))
    content = torch.load(tmp_path / "non_finite_step_000002.pt", weights_only=True)
    assert len(content["images"]) == len(content["masks"]) == 4
    assert content["losses"]["train/loss"].isnan()


def test_one_bad_step_more_than_allowed_stops(tmp_path):
    with pytest.raises(UserError, match="the loss of step 2 is not finite"):
        train(steps=2, callbacks=[NonFiniteLoss(tmp_path), Poison()])


def test_an_infinite_gradient_of_a_finite_loss_is_the_loss_scales_business(tmp_path):
    guard = NonFiniteLoss(tmp_path)
    plugin = fp16(scale=2.0**100)
    train([plugin], steps=1, callbacks=[guard])
    assert plugin.scaler.get_scale() == 2.0**99
    assert guard.bad_steps == 0
    assert list(tmp_path.iterdir()) == []
