"""Whole images: our fast path beside the reference (the authors' algorithm written plainly) and other networks.

From normalised images to panoptic and semantic maps at their size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from hydra.utils import instantiate
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from pem_lightning.checkpoints import load_network, read_checkpoint
from pem_lightning.data import CITYSCAPES
from pem_lightning.inference.optimize import CompileMode, OptimizedNetwork, Precision
from pem_lightning.inference.postprocess import panoptic, semantic_map
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.pem import PEM
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError
from scripts.benchmark import common, reference
from scripts.benchmark.baselines import BASELINES, Baseline, build_baseline
from scripts.benchmark.common import TOTAL, Lap, Times

REFERENCE = "reference"  # the authors' algorithm in float32, where others say their precision


class Maps(NamedTuple):
    """Results of one image. `panoptic` has ids; `classes` are those of the ids from 1 on."""

    semantic: Int[Tensor, "H W"]
    panoptic: Int[Tensor, "H W"]
    classes: list[int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_arguments(parser, size=(1024, 2048), batch=1, precisions=get_args(Precision))
    parser.add_argument("--compile", choices=get_args(CompileMode), help="mode of torch.compile for the fast path")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[], help="need requirements-bench.txt")
    parser.add_argument("--checkpoint", type=Path, help="of train.py, instead of --backbones with random weights")
    parser.add_argument("--image", type=Path, help="a photograph, brought to --size, instead of noise")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Compare, then time in turns; returns a report and the times.

    Raises:
        UserError: a file cannot be read, or a baseline's library is missing.
    """
    images = load_images(options)
    backbones = options.backbones if options.checkpoint is None else [options.checkpoint.stem]
    names = [(backbone, path) for backbone in backbones for path in (REFERENCE, *options.precisions)]
    names += [(baseline, precision) for baseline in options.baselines for precision in options.precisions]
    pipelines = {" ".join(name): build(*name, options) for name in names}
    differences = compare(pipelines, images) if options.equality else []
    tasks = {name: lambda lap, p=p: segment(p, images, lap) for name, p in pipelines.items()}
    times = common.time_in_turns(tasks, options.rounds, options.warmup, options.device)
    rows = []
    for subject, (name, pipeline) in zip(names, pipelines.items(), strict=True):
        common.say(f"operations and memory of {name}")
        baseline = times.get(f"{subject[0]} {REFERENCE}")
        speedup = common.quartiles(common.ratios(baseline, times[name])) if baseline else ""
        stages = " / ".join(f"{np.median(times[name][stage]):.3g}" for stage in ("network", "results"))
        memory = common.added_memory(run_once, *subject, options) if options.memory else ""
        gmacs = f"{pipeline.gmacs(images):.1f}"
        rows.append((name, common.quartiles(times[name][TOTAL]), speedup, stages, memory, gmacs))
    facts = f"Inference, {images.shape[2]}x{images.shape[3]}, batch {len(images)}"
    columns: tuple[str, ...] = ("", "s", "times as fast", "network / results, s", "added MiB", "GMACs")
    parts = [common.describe(facts, options), common.table(columns, rows)]
    parts += [f"{name}: {p.note}." for name, p in pipelines.items() if isinstance(p, Baseline)]
    if differences:
        columns = ("differs from the reference", "semantic pixels", "panoptic pixels", "class logits", "mask logits")
        parts.append(common.table(columns, differences))
    return "\n\n".join(parts) + "\n", times


def build(name: str, precision: str, options: argparse.Namespace) -> PEMPipeline | Baseline:
    """A network, by backbone or baseline, with its post-processing; a precision may be `REFERENCE`."""
    common.say(f"building {name} {precision}")
    if name in BASELINES:
        return build_baseline(name, precision, options.size, options.device)
    return PEMPipeline(name, precision, options)


@torch.no_grad()
def segment(pipeline: PEMPipeline | Baseline, images: Float[Tensor, "B 3 H W"], lap: Lap = lambda _: None) -> None:
    """What is timed."""
    output = pipeline.predict(images)
    lap("network")
    pipeline.postprocess(output, (images.shape[2], images.shape[3]))
    lap("results")


def run_once(name: str, precision: str, options: argparse.Namespace) -> None:
    segment(build(name, precision, options), load_images(options))


class PEMPipeline:
    """PEM as the reference or, in a precision, as `OptimizedNetwork` runs it."""

    def __init__(self, name: str, precision: str, options: argparse.Namespace) -> None:
        self.network, self.things, self.settings = load_weights(name, options.checkpoint, options.device)
        self.is_reference = precision == REFERENCE
        if self.is_reference:
            self.predict: nn.Module = Reference(self.network)
        else:
            self.predict = OptimizedNetwork(self.network, precision, options.compile)

    def gmacs(self, images: Float[Tensor, "B 3 H W"]) -> float:
        """By fvcore's conventions, see `models.flops`."""
        counted = self.predict if self.is_reference else OptimizedNetwork(self.network)  # which is not compiled
        return count_gmacs(counted, images.shape[2], images.shape[3])

    def postprocess(self, output: Predictions, size: tuple[int, int]) -> list[Maps]:
        """Maps of every image."""
        padded = tuple(4 * side for side in output.mask_logits.shape[2:])
        sizes: Any = {"padded_size": padded, "image_size": size, "output_size": size}
        found = []
        for logits in zip(output.class_logits, output.mask_logits, strict=True):
            settings: dict[str, Any] = {"object_mask_threshold": common.choose_threshold(logits[0]), **self.settings}
            order = settings.pop("resize_first")
            if self.is_reference:
                semantic = reference.semantic(logits[0], logits[1], resize_first=order, **sizes).argmax(0)
            else:
                semantic = semantic_map(logits[0], logits[1], resize_first=order, **sizes)
            fuse: Any = reference.panoptic if self.is_reference else panoptic
            ids, segments = fuse(*logits, thing_classes=self.things, **settings, **sizes)
            found.append(Maps(semantic, ids, [segment.class_id for segment in segments]))
        return found


class Reference(nn.Module):
    """`reference.predict` as a module, whose operations can be counted."""

    def __init__(self, network: PEM) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """See `reference.predict`."""
        return reference.predict(self.network, images)


@cache
def load_weights(backbone: str, checkpoint: Path | None, device: str) -> tuple[PEM, frozenset[int], dict[str, Any]]:
    """Network, countable classes and settings of post-processing: of a checkpoint, or random ones for Cityscapes."""
    if checkpoint is None:
        settings = {"resize_first": True, "overlap_threshold": 0.0}  # masks of random networks lie across one another
        return common.random_network(backbone).to(device), CITYSCAPES.thing_classes, settings
    content = read_checkpoint(checkpoint)
    network = instantiate(content.config["network"], num_classes=content.info.num_classes)
    load_network(network, content)
    settings = {"resize_first": True, **content.config["task"]["inference"]}
    settings.pop("top_k", None)  # of instances
    return network.eval().to(device), content.info.thing_classes, settings


def load_images(options: argparse.Namespace) -> Float[Tensor, "B 3 H W"]:
    """Normalised noise, or a photograph brought to the size."""
    if options.image is None:
        draw = torch.Generator().manual_seed(0)
        return torch.randn(options.batch, 3, *options.size, generator=draw).to(options.device)
    try:
        with Image.open(options.image) as photo:
            pixels = np.array(photo.convert("RGB").resize(options.size[::-1], Image.Resampling.BILINEAR))
    except OSError as error:
        raise UserError(f"--image {options.image} cannot be read: give a PNG or JPEG file") from error
    image = normalize(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
    return image.expand(options.batch, -1, -1, -1).contiguous().to(options.device)


@torch.no_grad()
def compare(pipelines: dict[str, PEMPipeline | Baseline], images: Float[Tensor, "B 3 H W"]) -> list[tuple[str, ...]]:
    """How far our paths are from the reference, and the reference from itself where only rounding differs."""

    def observe(pipeline: PEMPipeline) -> tuple[Predictions, list[Maps]]:
        output = pipeline.predict(images)
        output = Predictions(output.class_logits.clone(), output.mask_logits.clone())  # CUDA graphs reuse memory
        return output, pipeline.postprocess(output, (images.shape[2], images.shape[3]))

    rows = []
    for name, pipeline in pipelines.items():
        if isinstance(pipeline, Baseline):
            continue
        common.say(f"comparing {name}")
        if pipeline.is_reference:  # the first of its backbone
            expected = observe(pipeline)
            with common.other_library(images.device.type):
                rows.append((f"{name}, other convolutions", *difference(observe(pipeline), expected)))
        else:
            rows.append((name, *difference(observe(pipeline), expected)))
    return rows


def difference(actual: tuple[Predictions, list[Maps]], expected: tuple[Predictions, list[Maps]]) -> list[str]:
    """Pixels of another class in the semantic and in the panoptic maps; the largest deviation of the logits."""

    def pixels(classes: Callable[[Maps], Tensor]) -> str:
        differ = torch.stack([classes(a) != classes(b) for a, b in zip(actual[1], expected[1], strict=True)])
        return f"{int(differ.sum())} ({100 * float(differ.float().mean()):.2g} %)"

    def deviation(a: Tensor, b: Tensor) -> str:
        return f"{float((a - b).abs().max()):.1e} of {float(b.abs().max()):.1f}"

    logits = [deviation(a, b) for a, b in zip(actual[0][:2], expected[0][:2], strict=True)]
    return [pixels(lambda maps: maps.semantic), pixels(panoptic_classes), *logits]


def panoptic_classes(maps: Maps) -> Int[Tensor, "H W"]:
    """The class of every pixel of a panoptic map, -1 where no segment is."""
    return torch.tensor([-1, *maps.classes], device=maps.panoptic.device)[maps.panoptic.long()]
