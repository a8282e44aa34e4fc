"""The one LightningModule: what happens in a training step and in a validation. The parts are written elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, cast

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.inference.postprocess import Result, TaskInference, size_of
from pem_lightning.inference.tiles import TiledInference
from pem_lightning.inference.tta import TestTimeAugmentation
from pem_lightning.losses import SetCriterion
from pem_lightning.metrics.evaluator import Evaluation, Evaluator
from pem_lightning.preprocess import common_size, pad_batch
from pem_lightning.training.distributed import mean_over_processes, micro_batches_of, more_micro_batches
from pem_lightning.training.optim import clip_gradients
from pem_lightning.types import Batch, DatasetInfo, Predictions, UserError

log = logging.getLogger(__name__)


class ValidationOutput(TypedDict):
    """What callbacks get of a validation batch, image by image: results, and their scores (see `Evaluator.update`)."""

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
        micro_batches: equal parts that the images of a step run through the network in (see `BatchSplit`).
        fit_memory: take more micro-batches, from then on, when a step needs more memory than the device has.
        gradient_clip: largest norm of the gradient over all parameters; 0 for no limit.
        channels_last: memory format of the network's weights, and of the images in training.
        compile: a mode of `torch.compile` for training, or None. Validation, whose images have any size, is eager.
        scales: of the views in validation, see `TestTimeAugmentation`.
        flip: whether they are mirrored as well.
        tile, overlap: of large images in validation, see `TiledInference`.
    """

    def __init__(
        self,
        network: nn.Module,
        criterion: SetCriterion,
        inference: TaskInference,
        info: DatasetInfo,
        parameter_groups: Callable[[nn.Module], list[dict[str, Any]]],
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler],
        record: Mapping[str, Any] | None = None,
        *,
        micro_batches: int = 1,
        fit_memory: bool = False,
        gradient_clip: float = 0.0,
        channels_last: bool = False,
        compile: str | None = None,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        tile: Sequence[int] | None = None,
        overlap: int = 128,
    ) -> None:
        super().__init__()
        # Lightning's own loop divides every part's loss by the number of parts and knows no totals of a step.
        self.automatic_optimization = False
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.criterion = criterion
        self.inference = inference
        self.augmentation = TestTimeAugmentation(inference, scales, flip)
        self.tiled = TiledInference(self.augmentation, tile, overlap)
        self.info = info
        self.evaluator = Evaluator(info, inference.task)
        self.evaluation: Evaluation | None = None  # of the last validation
        self.evaluated_step = 0  # whose weights it is of
        self.parameter_groups = parameter_groups
        self.optimizer = optimizer
        self.schedule = schedule
        self.record = record or {}
        self.micro_batches = micro_batches
        self.fit_memory = fit_memory
        self.gradient_clip = gradient_clip
        self.compiled: Callable[[Tensor], Predictions] | None = None
        if compile is not None:  # the function and not the module, so that weights keep their names
            self.compiled = torch.compile(network.forward, mode=compile, dynamic=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One optimiser step on this device's share of the step's images; returns the loss of all devices."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast(torch.optim.lr_scheduler.LRScheduler, self.lr_schedulers())
        optimizer.zero_grad()
        losses = self._backward_within_memory(batch, optimizer)
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch.images))
        optimizer.step()
        schedule.step()
        return losses["loss"]

    def _backward_within_memory(self, batch: Batch, optimizer: LightningOptimizer) -> dict[str, Tensor]:
        """`_backward`; with `fit_memory` repeated in more micro-batches, as if nothing had happened, until it fits."""
        generators = _generator_states(self.device) if self.fit_memory else []
        buffers = [buffer.clone() for buffer in self.buffers()] if self.fit_memory else []
        while True:
            images, count = len(batch.images), self.micro_batches
            try:
                return self._backward(batch, optimizer)
            except torch.OutOfMemoryError as error:
                more = more_micro_batches(images, count)
                if more is None or not self.fit_memory:
                    raise UserError(_memory_hint(images // count, more is not None)) from error
            # Here the error, which holds the tensors of the failed attempt, is gone.
            self.micro_batches = more
            optimizer.zero_grad()
            _restore_generators(self.device, generators)
            with torch.no_grad():
                for buffer, before in zip(self.buffers(), buffers, strict=True):
                    buffer.copy_(before)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            log.info("memory is too small for micro-batches of %d: going on with %d", images // count, images // more)

    def _backward(self, batch: Batch, optimizer: LightningOptimizer) -> dict[str, Tensor]:
        """Add up the gradients of all micro-batches; returns the losses over all devices, and their sum as "loss"."""
        network = self.compiled or self.network
        size, totals, values = common_size(batch.images), None, []
        for number, part in enumerate(micro_batches_of(batch, self.micro_batches), 1):
            part = self.transfer_batch_to_device(part, self.device, 0)
            # Gradients of processes are averaged once, during the last backward pass.
            with optimizer.toggle_model(sync_grad=number == self.micro_batches):
                images, targets = pad_batch(part.images, part.targets, size)
                predictions = network(images.contiguous(memory_format=self.memory_format))
                if totals is None:
                    totals = self.criterion.totals(batch.targets, predictions.class_logits.shape[1], images.device)
                losses = self.criterion(predictions, targets, totals)
                values.append(torch.stack(list(losses.values())))
                with torch.autocast(images.device.type, enabled=False):  # Lightning's is around the whole step
                    self.manual_backward(values[-1].sum())
        summed = mean_over_processes(torch.stack(values).detach().sum(0))
        return {"loss": summed.sum(), **dict(zip(losses, summed, strict=True))}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; log its norm before that."""
        norm = clip_gradients(optimizer, self.gradient_clip, self.trainer.precision_plugin)
        self.log("train/grad_norm", norm, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Have the last step validated, wherever `val_check_interval` stands: Lightning does so on a stop."""
        trainer = self.trainer
        last_epoch = trainer.current_epoch + 1 == trainer.max_epochs and trainer.is_last_batch
        if last_epoch or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def validation_step(self, batch: Batch, batch_idx: int) -> ValidationOutput:
        """Predict one image after the other, each at its own size, and compare."""
        output = ValidationOutput(results=[], scores=[])
        for image, sample in zip(batch.images, batch.samples, strict=True):
            size, with_semantic = size_of(sample.panoptic), self.evaluator.needs_semantic
            (result,) = self.tiled(self.network, [image], size, with_semantic=with_semantic)
            output["scores"].append(self.evaluator.update(result, sample))
            output["results"].append(result)
        return output

    def on_validation_epoch_end(self) -> None:
        """Log the data set's metrics, in percent."""
        self.evaluation = self.evaluator.compute()
        if self.trainer.state.fn == "fit":
            self.evaluated_step = self.trainer.global_step
        self.evaluator.reset()
        for name, value in self.evaluation.scalars().items():
            self.log(name, value, sync_dist=True)  # equal on all devices already, which Lightning cannot know

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser and schedule as configured."""
        optimizer = self.optimizer(self.parameter_groups(self.network))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what evaluation and prediction need to do without any other file."""
        state = {"dataset_info": self.info.to_dict(), "evaluated_step": self.evaluated_step}
        if self.fit_memory:
            state["micro_batches"] = self.micro_batches
        checkpoint[CHECKPOINT_KEY] = {**self.record, **state}
        averaging = self._averaging()
        if averaging and "averaging_state" not in checkpoint:  # Lightning asks callbacks for full checkpoints only
            averaging.on_save_checkpoint(self.trainer, self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the last step's weights if the average is not wanted any more.

        Raises:
            UserError: the checkpoint counted its steps in another way, before there were micro-batches.
        """
        done = checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
        if done["total"]["completed"] != checkpoint["global_step"]:
            raise UserError(
                "the checkpoint is of an older version, whose training cannot go on: start a new one with weights="
            )
        ours = checkpoint.get(CHECKPOINT_KEY, {})
        self.evaluated_step = ours.get("evaluated_step", 0)
        if self.fit_memory:
            self.micro_batches = ours.get("micro_batches", self.micro_batches)
        if not self._averaging():
            checkpoint["state_dict"] = checkpoint.get("current_model_state", checkpoint["state_dict"])

    def _averaging(self) -> WeightAveraging | None:
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, WeightAveraging)), None)


def _generator_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _restore_generators(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _memory_hint(images: int, can_split: bool) -> str:
    problem = f"a micro-batch of {images} images needs more memory than the device has"
    if can_split:
        return f"{problem}: lower recipe.micro_batch_size, or set it to auto, which finds what fits"
    return f"{problem}: lower recipe.train_transform.crop_size or choose a smaller backbone"
