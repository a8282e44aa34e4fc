"""One step of the paper's training, ours beside the reference: uint8 images and boolean masks to updated weights.

Losses and gradients are compared first; then both learn from one batch, in turns.
"""

from __future__ import annotations

import argparse
import copy
from functools import cache
from math import prod
from typing import Any

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from pem_lightning.cli.build import prefers_channels_last
from pem_lightning.cli.errors import configs
from pem_lightning.losses import UniformSource
from pem_lightning.preprocess import pad_batch
from pem_lightning.types import Target, UserError
from scripts.benchmark import common, reference
from scripts.benchmark.common import TOTAL, Lap, Times

STAGES = ("data preparation", "forward", "matching and losses", "backward", "clipping and optimiser")
PRECISIONS = ("float32", "bfloat16", "float16")
LARGEST_DIFFERENCE = 0.01  # relative, of the sum of the losses in float32; rounding stays far below it
Batch = tuple[list[Tensor], list[Target]]
Found = tuple[dict[str, Tensor], dict[str, Tensor]]  # losses, and gradients by parameter


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_arguments(parser, size=(256, 512), batch=2, precisions=PRECISIONS)
    parser.add_argument("--segments", type=common.positive, default=15, help="of every image")
    parser.add_argument("--num-points", type=common.positive, default=12544, help="at which masks are compared")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Compare, then time in turns; returns a report and the times.

    Raises:
        UserError: our losses are not the reference's.
    """
    if options.batch < 2:
        raise UserError(f"--batch {options.batch}: training needs 2 or more, for normalisation over the batch")
    batch = draw_batch(options)
    differences = [row for b in options.backbones for row in compare(b, batch, options)] if options.equality else []
    names = [(b, p, path) for b in options.backbones for p in options.precisions for path in ("reference", "ours")]
    steps = {" ".join(name): Step(*name, options) for name in names}
    tasks = {name: lambda lap, step=step: step.run(batch, lap) for name, step in steps.items()}
    times = common.time_in_turns(tasks, options.rounds, options.warmup, options.device)
    rows = []
    for (backbone, precision, _), (name, found) in zip(names, times.items(), strict=True):
        baseline = times[f"{backbone} {precision} reference"]
        cells = [
            f"{common.number(1000 * np.median(found[stage]))}: {np.median(common.ratios(found, baseline, stage)):.2f}"
            for stage in STAGES
        ]
        memory = common.added_memory(run_twice, *name.split(), options) if options.memory else ""
        share = common.quartiles(common.ratios(found, baseline))
        rows.append((name, common.quartiles(found[TOTAL], scale=1000), share, *cells, memory))
    size = f"{options.batch} x {options.size[0]}x{options.size[1]}"
    facts = f"Training step, {size}, {options.segments} segments per image, {options.num_points} points"
    columns: tuple[str, ...] = ("ms: share of the reference's", "step", "share", *STAGES, "added MiB")
    parts = [common.describe(facts, options), common.table(columns, rows)]
    if differences:
        columns = ("relative difference from the reference", "loss", "largest of a loss", "gradients")
        parts.append(common.table(columns, differences))
    return "\n\n".join(parts) + "\n", times


class Step:
    """A random network that is trained by the paper's recipe for Cityscapes, on the path "reference" or "ours".

    `precision` is "float32" or that of autocast, in float16 with a scaled loss; `rand` the source of all random points,
    by default PyTorch's.
    """

    def __init__(self, backbone: str, precision: str, path: str, options: argparse.Namespace, **rand: Any) -> None:
        config, device = paper_config(), options.device
        self.network = copy.deepcopy(random_network(backbone)).to(device).train()
        mixed = precision != "float32"
        self.autocast = torch.autocast(device, getattr(torch, precision) if mixed else torch.bfloat16, enabled=mixed)
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "float16")
        self.clip = float(config.recipe.gradient_clip)
        self.is_reference = path == "reference"
        self.prepare = reference.prepare if self.is_reference else pad_batch
        groups, losses = config.recipe.parameter_groups, {"num_points": options.num_points, **rand}
        if self.is_reference:
            weights = {k: v for k, v in config.criterion.items() if k not in ("_target_", "num_points")}
            self.criterion = reference.SetLosses(**weights, **losses)
            rates = {k: groups[k] for k in ("lr", "weight_decay", "backbone_lr_multiplier")}
            self.optimizer = reference.build_optimizer(self.network, **rates)
        else:
            channels_last = prefers_channels_last(self.network, torch.device(device), mixed)
            self.layout = torch.channels_last if channels_last else torch.contiguous_format
            self.network.to(memory_format=self.layout)  # type: ignore[call-overload]
            self.criterion = instantiate(config.criterion, common.NUM_CLASSES, **losses).to(device)
            self.optimizer = instantiate(config.recipe.optimizer)(instantiate(groups)(self.network))

    def forward(self, batch: Batch, lap: Lap = lambda _: None) -> tuple[dict[str, Tensor], Tensor]:
        """The first three stages; returns the weighted losses, and their sum."""
        with self.autocast:
            images, targets = self.prepare(*batch)
            lap(STAGES[0])
            if self.is_reference:
                predictions = reference.predict(self.network, images)
            else:
                predictions = self.network(images.contiguous(memory_format=self.layout))
            lap(STAGES[1])
            losses = self.criterion(predictions, targets)
            total = torch.stack(list(losses.values())).sum()
            lap(STAGES[2])
        return losses, total

    def run(self, batch: Batch, lap: Lap = lambda _: None) -> None:
        """All stages."""
        self.scaler.scale(self.forward(batch, lap)[1]).backward()
        lap(STAGES[3])
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        lap(STAGES[4])


random_network = cache(common.random_network)


@cache
def paper_config(*overrides: str) -> DictConfig:
    """The experiment as it is shipped for Cityscapes."""
    with configs():
        return hydra.compose("train", overrides=["dataset=cityscapes", "task=panoptic", *overrides])


def draw_batch(options: argparse.Namespace) -> Batch:
    """Images of noise; the segments of each fill it and do not overlap."""
    count, (height, width) = options.segments, options.size
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(256, (options.batch, 3, height, width), dtype=torch.uint8, generator=draw)
    targets = []
    for _ in range(options.batch):
        coarse = torch.randn(1, count, -(-height // 32), -(-width // 32), generator=draw)
        masks = (
            F.interpolate(coarse, (height, width), mode="bicubic")[0].argmax(0) == torch.arange(count)[:, None, None]
        )
        labels = torch.randint(common.NUM_CLASSES, (count,), generator=draw)
        targets.append(Target(labels.to(options.device), masks.to(options.device)))
    return list(images.to(options.device)), targets


def run_twice(backbone: str, precision: str, path: str, options: argparse.Namespace) -> None:
    """What memory is measured of: the second step has the optimiser's state from the start."""
    step, batch = Step(backbone, precision, path, options), draw_batch(options)
    step.run(batch)
    step.run(batch)


def shared_draws() -> UniformSource:
    """Make a source that draws row by row, with a stream of its own for each number of points.

    The reference matches layer by layer and image by image, ours in one pass; their n-th rows are then the same, as
    rows of matching, of candidates and of other points differ in length.
    """
    streams: dict[int, torch.Generator] = {}

    def rand(shape: tuple[int, ...], device: torch.device) -> Tensor:
        stream = streams.setdefault(shape[-2], torch.Generator().manual_seed(shape[-2]))
        rows = [torch.rand(shape[-2:], generator=stream) for _ in range(prod(shape[:-2]))]
        return torch.stack(rows).view(shape).to(device) if rows else torch.empty(shape, device=device)

    return rand


def compare(backbone: str, batch: Batch, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """How far our losses and gradients are from the reference's, and those from themselves where only rounding differs.

    Normalisation takes running statistics: with those of a small batch, rounding alone grows to a percent.
    """
    common.say(f"comparing losses and gradients of {backbone}")

    def find(path: str) -> Found:
        step = Step(backbone, "float32", path, options, rand=shared_draws())
        for module in step.network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        losses, total = step.forward(batch)
        total.backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        return losses, {name: p.grad for name, p in step.network.named_parameters() if p.grad is not None}

    expected = find("reference")
    with common.other_library(options.device):
        rounding = difference(find("reference"), expected)
    ours = difference(find("ours"), expected)
    if not ours[0] <= LARGEST_DIFFERENCE:  # NaN is no equality
        raise UserError(
            f"our losses of {backbone} differ from the reference's by {ours[0]:.1%}, so times would say nothing "
            "(--no-equality measures them all the same)"
        )
    rows = {f"{backbone} reference, other convolutions": rounding, f"{backbone} ours": ours}
    return [(name, *(f"{value:.1e}" for value in values)) for name, values in rows.items()]


def difference(actual: Found, expected: Found) -> tuple[float, float, float]:
    """Relative: of the sum of the losses, of the loss that differs most, and the norm of the gradients' difference."""
    (losses, gradients), (expected_losses, expected_gradients) = actual, expected
    of_sum = abs(float(sum(losses.values()) / sum(expected_losses.values())) - 1)
    largest = max(abs(float(loss / expected_losses[name]) - 1) for name, loss in losses.items())
    if gradients.keys() != expected_gradients.keys():
        return of_sum, largest, float("inf")
    apart = torch.stack([(g - expected_gradients[name]).norm() for name, g in gradients.items()]).norm()
    return of_sum, largest, float(apart / torch.stack([g.norm() for g in expected_gradients.values()]).norm())
