"""The one LightningModule: steps and hooks only. What happens in them is written elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.evaluation import Evaluation, Evaluator
from pem_lightning.inference.task import Result, TaskInference, size_of
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.preprocess import normalize, pad_batch
from pem_lightning.types import Batch, DatasetInfo


class ValidationOutput(TypedDict):
    """What callbacks get of every validation batch: results and their scores (see `Evaluator.update`), by image."""

    results: list[Result]
    scores: list[float]


class PEMModule(LightningModule):
    """Trains and evaluates a network.

    Args:
        network: `PEM`, or anything with its interface.
        criterion: predictions and targets -> weighted losses by name.
        inference: predictions -> result of the task.
        info: the data set's classes.
        parameter_groups: network -> groups for the optimiser.
        optimizer: groups -> optimiser.
        schedule: optimiser -> learning-rate scheduler, stepped every iteration.
        record: how the experiment was configured, kept in checkpoints (see `checkpoints.Checkpoint`).
        scales: of the views in validation, see `TestTimeAugmentation`.
        flip: likewise.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: nn.Module,
        inference: TaskInference,
        info: DatasetInfo,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        record: Mapping[str, Any] | None = None,
        *,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.inference = inference
        self.augmentation = TestTimeAugmentation(inference, scales, flip)
        self.info = info
        self.evaluator = Evaluator(info, inference.task)
        self.evaluation: Evaluation | None = None  # of the last validation
        self.parameter_groups = parameter_groups
        self.optimizer = optimizer
        self.schedule = schedule
        self.record = record or {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One forward pass and its loss."""
        images, targets = pad_batch(batch.images, batch.targets)
        losses = self.criterion(self.network(images), targets)
        loss = torch.stack(list(losses.values())).sum()
        self.log("train/loss", loss, batch_size=len(images))
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> ValidationOutput:
        """Predict one image after the other, each at its own size, and compare."""
        output = ValidationOutput(results=[], scores=[])
        for image, sample in zip(batch.images, batch.samples, strict=True):
            inputs, output_size = normalize(image)[None], size_of(sample.panoptic)
            (result,) = self.augmentation(
                self.network, inputs, output_size, with_semantic=self.evaluator.needs_semantic
            )
            output["scores"].append(self.evaluator.update(result, sample))
            output["results"].append(result)
        return output

    def on_validation_epoch_end(self) -> None:
        """Log the data set's metrics, in percent."""
        self.evaluation = self.evaluator.compute()
        self.evaluator.reset()
        for name, value in self.evaluation.scalars().items():
            self.log(name, value, sync_dist=True)  # equal on all devices already, which Lightning cannot know

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser and schedule as configured."""
        optimizer = self.optimizer(self.parameter_groups(self.network))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what evaluation and prediction need to do without any other file."""
        checkpoint[CHECKPOINT_KEY] = {**self.record, "dataset_info": self.info.to_dict()}
