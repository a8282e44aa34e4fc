"""What is compared: a network together with its post-processing, as a user runs them.

This file holds our own paths; `peers` holds other networks.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pem_lightning.benchmark.timing import Clock
from pem_lightning.benchmark.weights import Weights
from pem_lightning.inference.optimize import OptimizedNetwork
from pem_lightning.inference.postprocess import Result, Sizes, TaskInference, size_of
from pem_lightning.inference.prototypes import record_selections
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.pem import PEM
from pem_lightning.types import Predictions
from scripts.benchmark import reference as straightforward

TASKS = ("semantic", "panoptic")
POSTPROCESSING = "post-processing"
WHOLE_NETWORK = "network"


class Contestant(ABC):
    """A network with its post-processing.

    Attributes:
        name: unique within a benchmark.
        network: on its device, in its precision.
        baseline: name of the straightforward path it is compared with, if it has one.
        precision: of its weights.
        threshold: class probability above which panoptic post-processing keeps a query.
        kept_queries: how many that were when it was tried.
        source: where its weights are from.
        tasks: what its post-processing makes.
        note: what a reader has to know to judge its numbers.
    """

    tasks: tuple[str, ...] = TASKS
    last_stage = WHOLE_NETWORK

    def __init__(self, name: str, network: nn.Module, *, baseline: str = "", precision: str = "float32") -> None:
        self.name = name
        self.network = network
        self.baseline = baseline
        self.precision = precision
        self.threshold = 0.8
        self.kept_queries: int | None = None
        self.source = "random"
        self.note = ""

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Run the network on normalised images."""
        return self.network(images)

    @abstractmethod
    def postprocess(self, output: Any, size: tuple[int, int], tasks: Collection[str]) -> list[Any]:
        """Make the results of some tasks at the images' size, one per image."""

    @abstractmethod
    def class_logits(self, output: Any) -> Float[Tensor, "B Q _"] | None:
        """Scores of every query for the classes and, last, for "no object"; None where there are no queries."""

    @abstractmethod
    def gmacs(self, height: int, width: int) -> float:
        """Giga multiply-accumulates of the network for one image."""

    def keep(self, output: Any) -> Any:
        """The output as something that later runs do not overwrite."""
        return output

    def stage_ends(self) -> Mapping[str, nn.Module]:
        """Stages before the network's last one: stage -> the module at whose end it ends."""
        return {}

    def uncompiled(self) -> Contestant:
        """The same without compilation, for counting: copies of modules are not compiled."""
        twin = copy.copy(self)
        twin.network = copy.deepcopy(self.network)
        return twin

    @torch.no_grad()
    def run(self, images: Float[Tensor, "B 3 H W"], clock: Clock | None = None) -> Any:
        """Segment images; returns the network's output."""
        clock = clock or Clock(images.device)
        with self._laps(clock):
            output = self.predict(images)
        clock.lap(self.last_stage)
        self.postprocess(output, size_of(images), self.tasks)
        clock.lap(POSTPROCESSING)
        return output

    @contextmanager
    def _laps(self, clock: Clock) -> Iterator[None]:
        handles = [
            module.register_forward_hook(lambda *_, stage=stage: clock.lap(stage))
            for stage, module in self.stage_ends().items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class PEMContestant(Contestant):
    """One of our own paths."""

    last_stage = "transformer decoder"

    def __init__(self, name: str, network: nn.Module, weights: Weights, precision: str = "float32") -> None:
        super().__init__(name, network, baseline=straightforward_name(weights.backbone), precision=precision)
        self.thing_classes, self.source = weights.thing_classes, weights.source
        self.settings = dict(weights.inference)
        self.threshold = self.settings.pop("object_mask_threshold", self.threshold)

    @property
    def pem(self) -> PEM:
        """The network inside whatever is around it."""
        return self.network.network if hasattr(self.network, "network") else self.network  # type: ignore

    def stage_ends(self) -> Mapping[str, nn.Module]:
        """Every path computes these two modules last of the backbone and of the pixel decoder."""
        return {"backbone": self.pem.backbone, "pixel decoder": self.pem.pixel_decoder.mask_projection}

    def class_logits(self, output: Predictions) -> Float[Tensor, "B Q _"]:
        """Those of the last layer."""
        return output.class_logits

    @contextmanager
    def record_prototypes(self) -> Iterator[list[Int64[Tensor, "B M Q"]]]:
        """A list that holds the positions of every layer's prototypes when the context ends; empty if none are seen."""
        positions: list[Int64[Tensor, "B M Q"]] = []
        with record_selections(self.pem) as selections:
            yield positions
        positions += [selection.positions for selection in selections]

    def keep(self, output: Predictions) -> Predictions:
        """A copy: CUDA graphs write every output to the same memory."""
        return Predictions(output.class_logits.clone(), output.mask_logits.clone())

    def gmacs(self, height: int, width: int) -> float:
        """By fvcore's conventions, see `networks.complexity`."""
        return count_gmacs(self.network, height, width)

    def postprocess(self, output: Predictions, size: tuple[int, int], tasks: Collection[str]) -> list[Result]:
        """Through the project's own entry point."""
        task = "panoptic" if "panoptic" in tasks else "semantic"
        inference = TaskInference(task, self.thing_classes, object_mask_threshold=self.threshold, **self.settings)
        return [inference(one, size, size, with_semantic="semantic" in tasks) for one in _one_by_one(output)]


class Library(PEMContestant):
    """The network as `build_pem` returns it, with the project's post-processing."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(library_name(weights.backbone), weights.network, weights)


class Fast(PEMContestant):
    """The network optimised for inference, with the project's post-processing."""

    def __init__(self, weights: Weights, precision: str = "float32", compile: str | None = None) -> None:
        network = OptimizedNetwork(weights.network, precision=precision, compile=compile)  # type: ignore[arg-type]
        super().__init__(fast_name(weights.backbone, precision, compile), network, weights, precision)
        self.compile = compile
        if compile:
            self.last_stage = WHOLE_NETWORK

    def stage_ends(self) -> Mapping[str, nn.Module]:
        """None inside a compiled network: looking in would change it."""
        return {} if self.compile else super().stage_ends()

    @contextmanager
    def record_prototypes(self) -> Iterator[list[Int64[Tensor, "B M Q"]]]:
        """None of a compiled network, likewise."""
        if self.compile:
            yield []
            return
        with super().record_prototypes() as positions:
            yield positions


class _StraightforwardNetwork(nn.Module):
    """`straightforward.predict` as a module, which can be counted and moved."""

    def __init__(self, network: PEM) -> None:
        super().__init__()
        self.network = network
        self.prototypes: list[Int64[Tensor, "B M Q"]] | None = None

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        return straightforward.predict(self.network, images, self.prototypes)


class Straightforward(PEMContestant):
    """The authors' algorithm."""

    def __init__(self, weights: Weights) -> None:
        name = straightforward_name(weights.backbone)
        super().__init__(name, _StraightforwardNetwork(weights.network), weights)

    @contextmanager
    def record_prototypes(self) -> Iterator[list[Int64[Tensor, "B M Q"]]]:
        """As this path chose them itself."""
        assert isinstance(self.network, _StraightforwardNetwork)
        positions: list[Int64[Tensor, "B M Q"]] = []
        self.network.prototypes = positions
        try:
            yield positions
        finally:
            self.network.prototypes = None

    def postprocess(self, output: Predictions, size: tuple[int, int], tasks: Collection[str]) -> list[Result]:
        """Every mask at full resolution."""
        settings = {"resize_first": True, **self.settings}
        resize_first = settings.pop("resize_first")
        results = []
        for class_logits, mask_logits in zip(output.class_logits, output.mask_logits, strict=True):
            height, width = size_of(mask_logits)
            at = Sizes(padded_size=(4 * height, 4 * width), image_size=size, output_size=size)
            result = Result()
            if "semantic" in tasks:
                scores = straightforward.semantic(class_logits, mask_logits, resize_first=resize_first, **at)
                result = result._replace(semantic=scores.argmax(0))
            if "panoptic" in tasks:
                id_map, segments = straightforward.panoptic(
                    class_logits,
                    mask_logits,
                    thing_classes=self.thing_classes,
                    object_mask_threshold=self.threshold,
                    **settings,
                    **at,
                )
                result = result._replace(panoptic=id_map, segments=tuple(segments))
            results.append(result)
        return results


def straightforward_name(backbone: str) -> str:
    """Name of a backbone's straightforward path."""
    return f"{backbone} straightforward"


def library_name(backbone: str) -> str:
    """Name of a backbone's plain network."""
    return f"{backbone} library"


def fast_name(backbone: str, precision: str = "float32", compile: str | None = None) -> str:
    """Name of a backbone's fast path."""
    return f"{backbone} fast {precision}" + (f" compile={compile}" if compile else "")


def choose_threshold(class_logits: Float[Tensor, "B Q _"], wanted: int) -> float:
    """A class probability that `wanted` queries of the first image exceed, half-way between the last and the next.

    Random networks are never sure, so that panoptic post-processing with a usual threshold would have nothing to do.
    Queries that are just as sure as the last are kept, too; where there are not enough, all are.
    """
    scores, labels = class_logits[0].float().softmax(-1).max(-1)
    candidates = scores[labels != class_logits.shape[-1] - 1].sort(descending=True).values.tolist()
    last = candidates[min(wanted, len(candidates)) - 1] if candidates else 0.0
    return (last + max((score for score in candidates if score < last), default=0.0)) / 2


def count_kept(class_logits: Float[Tensor, "B Q _"], threshold: float) -> int:
    """How many queries of the first image exceed a class probability."""
    scores, labels = class_logits[0].float().softmax(-1).max(-1)
    return int(((labels != class_logits.shape[-1] - 1) & (scores > threshold)).sum())


def _one_by_one(output: Predictions) -> Iterator[Predictions]:
    for i in range(len(output.class_logits)):
        yield Predictions(output.class_logits[i : i + 1], output.mask_logits[i : i + 1])
