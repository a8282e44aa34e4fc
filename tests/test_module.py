import pytest

from pem_lightning.types import UserError
from tests.small_training import train


def loops(steps):
    return {"fit_loop": {"epoch_loop.manual_optimization.optim_step_progress": {"total": {"completed": steps}}}}


def test_a_step_logs_its_losses_and_moves_the_schedule():
    module, trainer, losses = train()
    assert trainer.global_step == 3  # of the optimiser, with two micro-batches in each
    assert {"train/loss", "train/loss_ce", "train/loss_mask", "train/loss_dice"} < trainer.callback_metrics.keys()
    parts = [trainer.callback_metrics[f"train/loss_{name}"].item() for name in ("ce", "mask", "dice")]
    assert sum(parts) == pytest.approx(losses[-1])
    assert module.lr_schedulers().last_epoch == 3
    assert losses[-1] < losses[0]


def test_checkpoints_that_counted_steps_otherwise_are_not_resumed():
    module, _, _ = train(steps=1)
    module.on_load_checkpoint({"global_step": 4, "loops": loops(4)})
    with pytest.raises(UserError, match="weights="):
        module.on_load_checkpoint({"global_step": 4, "loops": loops(0)})
