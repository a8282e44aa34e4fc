"""A training run that breaks down, for tests of what happens then."""

from lightning import Callback


class StopOnce(Callback):
    """Fails after the first step of a run that was not resumed."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 1 and trainer.ckpt_path is None:
            raise RuntimeError("the first time")
