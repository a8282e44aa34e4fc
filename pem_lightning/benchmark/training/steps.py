"""What is compared in training: a whole step, from uint8 images and boolean masks to updated weights."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import Any

import hydra
import torch
from hydra.utils import instantiate
from jaxtyping import Float
from omegaconf import DictConfig
from torch import Tensor, nn

from pem_lightning.benchmark.timing import Clock
from pem_lightning.cli.build import prefers_channels_last
from pem_lightning.cli.errors import CONF
from pem_lightning.losses import UniformSource
from pem_lightning.models.pem import PEM
from pem_lightning.preprocess import pad_batch
from pem_lightning.types import Batch, Predictions, Target
from scripts.benchmark import reference as straightforward

STAGES = ("data preparation", "forward", "matching and losses", "backward", "clipping and optimiser")

Losses = dict[str, Tensor]
Prepared = tuple[Tensor, list[Target]]


@cache
def paper_config() -> DictConfig:
    """The experiment as shipped for Cityscapes: its recipe and its criterion are what both paths train with."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", overrides=["dataset=cityscapes", "task=panoptic"])


class TrainingStep(ABC):
    """A network that is trained by the paper's recipe.

    Args:
        network: its weights are copied.
        precision: "float32", or that of autocast; "float16" with a scaled loss.
        compile: mode of `torch.compile` for the network, if any.
        num_points: at which masks are compared.
        rand: source of all random points; None for the path's own.
    """

    def __init__(
        self,
        network: PEM,
        *,
        precision: str = "float32",
        compile: str | None = None,
        num_points: int = 12544,
        rand: UniformSource | None = None,
    ) -> None:
        self.network = copy.deepcopy(network).train()
        self.device = next(network.parameters()).device
        self.num_classes = network.transformer_decoder.class_head.out_features - 1
        self.precision = precision
        self.compile = compile
        self.num_points = num_points
        self.rand: dict[str, Any] = {} if rand is None else {"rand": rand}
        self.clip = float(paper_config().recipe.gradient_clip)
        self.optimizer = self.build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")

    @abstractmethod
    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the network's parameters."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Prepared:
        """Normalise images, and pad them and the masks to one size."""

    @abstractmethod
    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """Run the network, auxiliary predictions included."""

    @abstractmethod
    def losses(self, predictions: Predictions, targets: list[Target]) -> Losses:
        """Match and compute the weighted losses of all layers."""

    def run(self, batch: Batch, clock: Clock | None = None) -> Losses:
        """One step; returns the weighted losses before it."""
        clock = clock or Clock(self.device)
        losses, total = self._forward(batch, clock)
        self.scaler.scale(total).backward()
        clock.lap(STAGES[3])
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        clock.lap(STAGES[4])
        return losses

    def settle(self, batch: Batch) -> None:
        """Take steps until one is not skipped: one, but in float16 as many as it takes to find the loss's scale."""
        scale = float("inf")
        while self.scaler.get_scale() < scale:
            scale = self.scaler.get_scale()
            self.run(batch)

    def gradients(self, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
        """Losses, and gradients by parameter; no weight changes."""
        losses, total = self._forward(batch, Clock(self.device))
        total.backward()
        found = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return {name: loss.detach() for name, loss in losses.items()}, found

    def freeze_statistics(self) -> None:
        """Normalise by running statistics instead of the batch's."""
        for module in self.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def describe_optimizer(self) -> str:
        """Name, variant and number of groups."""
        variants = [name for name in ("fused", "foreach") if self.optimizer.defaults.get(name)]
        groups = len(self.optimizer.param_groups)
        return f"{' '.join([type(self.optimizer).__name__, *variants])}, groups: {groups}"

    def _forward(self, batch: Batch, clock: Clock) -> tuple[Losses, Tensor]:
        with self._autocast():
            images, targets = self.prepare(batch)
            clock.lap(STAGES[0])
            predictions = self.predict(images)
            clock.lap(STAGES[1])
            losses = self.losses(predictions, targets)
            total = torch.stack(list(losses.values())).sum()
            clock.lap(STAGES[2])
        return losses, total

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        if self.precision == "float32":
            yield
            return
        with torch.autocast(self.device.type, getattr(torch, self.precision)):
            yield


class OurStep(TrainingStep):
    """The project's own, as `module.PEMModule` trains."""

    def __init__(self, network: PEM, **settings: Any) -> None:
        super().__init__(network, **settings)
        channels_last = prefers_channels_last(self.network, self.device, mixed=self.precision != "float32")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        config = instantiate(paper_config().criterion, _partial_=True)
        self.criterion = config(self.num_classes, num_points=self.num_points, **self.rand).to(self.device)
        self.called = torch.compile(self.network, mode=self.compile) if self.compile else self.network

    def build_optimizer(self) -> torch.optim.Optimizer:
        """As the recipe says."""
        recipe = paper_config().recipe
        return instantiate(recipe.optimizer)(instantiate(recipe.parameter_groups)(self.network))

    def prepare(self, batch: Batch) -> Prepared:
        """By `preprocess.pad_batch`."""
        return pad_batch(batch.images, batch.targets)

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """By the network's own forward pass, in the memory format of training."""
        return self.called(images.contiguous(memory_format=self.memory_format))

    def losses(self, predictions: Predictions, targets: list[Target]) -> Losses:
        """By `losses.SetCriterion`."""
        return self.criterion(predictions, targets)


class StraightforwardStep(TrainingStep):
    """The authors' algorithm."""

    def __init__(self, network: PEM, **settings: Any) -> None:
        super().__init__(network, **settings)
        shared = {field.name for field in fields(straightforward.SetLosses)} - {"num_points", "rand"}
        weights = {name: value for name, value in paper_config().criterion.items() if name in shared}
        self.criterion = straightforward.SetLosses(**weights, num_points=self.num_points, **self.rand)

    def build_optimizer(self) -> torch.optim.Optimizer:
        """With the recipe's values."""
        values = paper_config().recipe.parameter_groups
        names = ("lr", "weight_decay", "backbone_lr_multiplier")
        return straightforward.build_optimizer(self.network, **{name: values[name] for name in names})

    def prepare(self, batch: Batch) -> Prepared:
        """Image by image."""
        return straightforward.prepare(batch.images, batch.targets)

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """By `straightforward.predict`."""
        return straightforward.predict(self.network, images)

    def losses(self, predictions: Predictions, targets: list[Target]) -> Losses:
        """Layer by layer."""
        return self.criterion(predictions, targets)
