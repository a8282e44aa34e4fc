"""Training samples of Cityscapes' size: stage by stage, and from the loader, from PNG files and from the cache.

Draws its own images, with a camera's noise, in a temporary folder.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from pem_lightning.data import CachedDataset, CityscapesDataModule, CityscapesDataset, TrainTransform
from pem_lightning.data.street_scene import draw_street
from pem_lightning.types import Sample
from scripts.benchmark import common
from scripts.benchmark.common import TOTAL, Times

CROP = (512, 1024)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=common.parse_size, default=(1024, 2048), help="HEIGHTxWIDTH of the images")
    parser.add_argument("--images", type=common.positive, default=16, help="how many are drawn, 4 or more")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of loading processes")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Returns a report, and no times by stage."""
    torch.set_num_threads(1)  # as in a worker
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root, cache = Path(scratch) / "png", Path(scratch) / "cache"
        write_images(root, options.images, *options.size)
        png = CityscapesDataset(root, "train")
        stages = measure_stages(png, CachedDataset(png, cache), options)
        speeds = {n: [measure_loader(root, c, n, options.rounds) for c in (None, cache)] for n in options.workers}
    facts = f"Training samples of {options.size[0]}x{options.size[1]}, crops of {CROP[0]}x{CROP[1]}"
    rows = [(name, common.quartiles(one[TOTAL], scale=1000)) for name, one in stages.items()]
    parts = [common.describe(facts, options), common.table(("stage", "ms"), rows)]
    cells = [(str(n), f"{png:.1f}", f"{cached:.1f}", f"{cached / png:.1f}") for n, (png, cached) in speeds.items()]
    parts.append(common.table(("workers", "PNG, images/s", "cache, images/s", "times as fast"), cells))
    return "\n\n".join(parts) + "\n", {}


def write_images(root: Path, count: int, height: int, width: int) -> None:
    """Streets, enlarged from a quarter of the size, with noise, which PNG cannot compress."""
    rng = np.random.default_rng(0)
    for index in range(count):
        image, ids = draw_street(rng, height // 4, width // 4)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        image = np.clip(image + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)
        ids = cv2.resize(ids, (width, height), interpolation=cv2.INTER_NEAREST)
        for array, folder, kind in ((image, "leftImg8bit", "leftImg8bit"), (ids, "gtFine", "gtFine_instanceIds")):
            for split in ("train", "val"):
                path = root / folder / split / "drawn" / f"drawn_{index:06d}_000000_{kind}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path, compress_level=6)


def measure_stages(png: CityscapesDataset, cached: CachedDataset, options: argparse.Namespace) -> dict[str, Times]:
    """Every stage in turn, on one image after the other."""
    sample, indices = png.read(0), cycle(range(len(png)))
    crop_first, augment = TrainTransform(CROP, color_jitter=None, flip=0), TrainTransform(CROP)
    for index in range(len(cached)):  # the first reading compares hashes
        cached.read(index)
    changes = {"resize all, then crop": resize_and_crop, "crop first": crop_first, "whole augmentation": augment}
    tasks: dict[str, Any] = {name: lambda _, change=change: change(sample) for name, change in changes.items()}
    for source, data in (("PNG", png), ("cache", cached)):
        tasks[f"read: {source}"] = lambda _, data=data: data.read(next(indices))
        for name, change in changes.items():
            tasks[f"{source}, {name}"] = lambda _, data=data, change=change: change(data.read(next(indices)))
    return common.time_in_turns(tasks, options.rounds, options.warmup)


def resize_and_crop(sample: Sample) -> None:
    """Resize all to a random one of the paper's sizes, then crop: what cropping first saves."""
    height, width = sample.panoptic.shape
    scale = 0.1 * int(torch.randint(5, 21, ()))
    size = (round(scale * width), round(scale * height))
    top, left = (int(torch.randint(max(side - crop, 0) + 1, ())) for side, crop in zip(size[::-1], CROP, strict=True))
    image = Image.fromarray(sample.image.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
    ids = Image.fromarray(sample.panoptic.numpy()).resize(size, Image.Resampling.NEAREST)
    for whole in (image, ids):
        np.array(whole)[top : top + CROP[0], left : left + CROP[1]].copy()


def measure_loader(root: Path, cache: Path | None, workers: int, rounds: int) -> float:
    """Images per second of the training loader, targets included: the median of epochs after the first."""
    data = CityscapesDataModule(root, batch_size=4, num_workers=workers, cache=cache)
    data.setup("fit")
    loader, speeds = data.train_dataloader(), []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        images = sum(len(batch.images) for batch in loader)
        speeds.append(images / (time.perf_counter() - start))
    return float(np.median(speeds[1:]))
