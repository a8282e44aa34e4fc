"""How far two paths of one network differ, down to the pixels, and how much of that is rounding anyway.

The yardstick is one and the same path with another library behind its convolutions.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from pem_lightning.benchmark.contestants import PEMContestant
from pem_lightning.inference.postprocess import Result, size_of
from pem_lightning.types import Predictions


@dataclass(frozen=True)
class Observation:
    """What a path made of some images.

    Attributes:
        predictions: of the last layer.
        results: one per image.
        prototypes: position of every prototype, per layer [B, M, Q]; empty where it cannot be seen.
    """

    predictions: Predictions
    results: list[Result]
    prototypes: list[Int64[Tensor, "B M Q"]]


@dataclass(frozen=True)
class Difference:
    """How two observations of the same images differ.

    Attributes:
        pixels: how many there are.
        semantic_pixels: those with another class in the semantic map.
        panoptic_pixels: those with another class, or none, in the panoptic map.
        class_logits: largest deviation.
        mask_logits: largest deviation.
        largest_mask_logit: magnitude of the largest mask logit, to judge the deviation by.
        prototypes: how many choices of a prototype there are (layers x images x heads x queries).
        prototype_flips: those that fell on another position; None where it cannot be seen.
    """

    pixels: int
    semantic_pixels: int
    panoptic_pixels: int
    class_logits: float
    mask_logits: float
    largest_mask_logit: float
    prototypes: int
    prototype_flips: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, with shares."""
        shares = {
            "semantic_share": self.semantic_pixels / self.pixels,
            "panoptic_share": self.panoptic_pixels / self.pixels,
        }
        return {**asdict(self), **shares}


@torch.no_grad()
def observe(contestant: PEMContestant, images: Float[Tensor, "B 3 H W"]) -> Observation:
    """Segment images and watch which prototypes are chosen, unless the network is compiled."""
    with contestant.record_prototypes() as prototypes:
        predictions = contestant.keep(contestant.predict(images))
    results = contestant.postprocess(predictions, size_of(images), contestant.tasks)
    return Observation(predictions, results, prototypes)


def compare(a: Observation, b: Observation) -> Difference:
    """Compare two observations of the same images."""
    semantic = [x.semantic != y.semantic for x, y in zip(a.results, b.results, strict=True)]
    panoptic = [panoptic_classes(x) != panoptic_classes(y) for x, y in zip(a.results, b.results, strict=True)]
    flips = None
    if a.prototypes and b.prototypes:
        flips = sum(int((x != y).sum()) for x, y in zip(a.prototypes, b.prototypes, strict=True))
    return Difference(
        pixels=sum(x.numel() for x in panoptic),
        semantic_pixels=sum(int(torch.as_tensor(x).sum()) for x in semantic),
        panoptic_pixels=sum(int(x.sum()) for x in panoptic),
        class_logits=_deviation(a.predictions.class_logits, b.predictions.class_logits),
        mask_logits=_deviation(a.predictions.mask_logits, b.predictions.mask_logits),
        largest_mask_logit=float(b.predictions.mask_logits.abs().max()),
        prototypes=sum(x.numel() for x in b.prototypes),
        prototype_flips=flips,
    )


def panoptic_classes(result: Result) -> Int[Tensor, "H W"]:
    """The class of every pixel of a panoptic result, -1 where no segment is."""
    assert result.panoptic is not None
    classes = torch.full((max((s.id for s in result.segments), default=0) + 1,), -1, device=result.panoptic.device)
    for segment in result.segments:
        classes[segment.id] = segment.class_id
    return classes[result.panoptic.long()]


def other_library(device: torch.device) -> tuple[str, AbstractContextManager[Any]]:
    """Another library behind the convolutions: its description, and the context in which it is used."""
    if device.type == "cuda":
        return "without cuDNN", torch.backends.cudnn.flags(enabled=False)
    # None: left as it is, because setting it warns where there is no GPU of Intel's
    return "without oneDNN", torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)


def _deviation(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
