"""What a benchmark of training is asked to do, and its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from pem_lightning.benchmark.settings import check_choices, check_numbers, find_device
from pem_lightning.data.cityscapes import panoptic_from_instance_ids
from pem_lightning.data.street_scene import draw_street
from pem_lightning.data.targets import panoptic_target
from pem_lightning.inference.optimize import CompileMode, Precision
from pem_lightning.models.backbones import BACKBONES
from pem_lightning.types import Batch, Sample, Target, UserError

Kind = Literal["straightforward", "ours"]


@dataclass(frozen=True)
class TrainingSettings:
    """A benchmark of training steps.

    Attributes:
        backbones: by name.
        size: height and width of the images in pixels.
        batch: images at once; two at least, because normalisation over the batch needs them.
        segments: target masks of every image.
        num_points: at which masks are compared.
        precisions: of both paths; other than float32 by autocast.
        compile: of our network: "none" and modes of `torch.compile`.
        contestants: which of `Kind`.
        device: "cpu", "cuda" or "auto".
        threads: of PyTorch on the CPU; None leaves its choice.
        rounds: measurements of every contestant.
        warmup: rounds before them.
        memory: measure peak memory, each contestant in its own process.
        equality: compare our losses and gradients with the straightforward ones, and refuse to time what differs.

    Raises:
        UserError: a name or a number makes no sense; the message names the choices.
    """

    backbones: tuple[str, ...] = ("stdc1", "resnet50")
    size: tuple[int, int] = (256, 512)
    batch: int = 2
    segments: int = 15
    num_points: int = 12544
    precisions: tuple[str, ...] = ("float32",)
    compile: tuple[str, ...] = ("none",)
    contestants: tuple[str, ...] = get_args(Kind)
    device: str = "auto"
    threads: int | None = None
    rounds: int = 5
    warmup: int = 1
    memory: bool = True
    equality: bool = True

    def __post_init__(self) -> None:
        check_choices("backbones", self.backbones, BACKBONES)
        check_choices("precisions", self.precisions, get_args(Precision))
        check_choices("compile", self.compile, ("none", *get_args(CompileMode)))
        check_choices("contestants", self.contestants, get_args(Kind))
        others = {"segments": self.segments, "num-points": self.num_points}
        check_numbers(self.size, self.rounds, self.warmup, self.threads, others)
        find_device(self.device)
        if self.batch < 2:
            raise UserError(f"--batch {self.batch}: training needs 2 or more, for normalisation over the batch")
        if "float16" in self.precisions and self.torch_device.type != "cuda":
            raise UserError("--precisions float16: training in it needs a GPU, choose bfloat16")

    @property
    def torch_device(self) -> torch.device:
        """Where everything runs."""
        return find_device(self.device)


def draw_batch(settings: TrainingSettings) -> Batch:
    """Draw street scenes and their targets.

    A scene shows a dozen segments or more. Where more are wanted, those of further scenes lie across them, which is
    all the same to the losses; where fewer are, the smallest are left out.
    """
    device = settings.torch_device
    samples = [_draw_sample(settings.size, i) for i in range(settings.batch)]
    targets = []
    for i, sample in enumerate(samples):
        target = panoptic_target(sample)
        further = i + len(samples)
        while len(target.labels) < settings.segments:
            more = panoptic_target(_draw_sample(settings.size, further))
            target = Target(torch.cat([target.labels, more.labels]), torch.cat([target.masks, more.masks]))
            further += len(samples)
        largest = target.masks.sum((1, 2)).argsort(descending=True, stable=True)[: settings.segments]
        targets.append(Target(target.labels[largest].to(device), target.masks[largest].to(device)))
    return Batch([sample.image.to(device) for sample in samples], targets, [])


def _draw_sample(size: tuple[int, int], seed: int) -> Sample:
    image, ids = draw_street(np.random.default_rng([0, seed]), *size)
    panoptic, segments = panoptic_from_instance_ids(ids)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    return Sample(pixels, torch.from_numpy(panoptic), segments, f"street {seed}")
