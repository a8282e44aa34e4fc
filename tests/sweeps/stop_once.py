"""A training run that breaks down, for tests of what happens then."""

from lightning import Callback


class StopOnce(Callback):
    """Fails after the second step of a run that was not resumed; the first is saved by then."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2 and trainer.ckpt_path is None:
            raise RuntimeError("the first time")
