"""Measures how fast training samples are made, stage by stage and with several workers, from PNGs and from the cache.

    python scripts/benchmark_data.py [--workers 0 1 2 4] [--json FILE] [--quick]

It draws its own images of Cityscapes' size and layout in a temporary folder, and uses the paper's augmentation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from PIL import Image

from pem_lightning.data import CachedDataset, CityscapesDataModule, CityscapesDataset, TrainTransform, build_target
from pem_lightning.data.dataset import read_map, read_rgb
from pem_lightning.data.street_scene import draw_street
from pem_lightning.data.transforms import PAPER_SHORTEST_EDGES, Window, pick_window, resize, resize_window, resized_size
from pem_lightning.types import Sample, UserError

CROP = (512, 1024)
CURE = "run the benchmark again"


class Spread(NamedTuple):
    """Median and quartiles of a stage, in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        """Summarise measurements."""
        low, median, high = statistics.quantiles((1000 * s for s in seconds), n=4, method="inclusive")
        return cls(median, low, high)


class Reused(NamedTuple):
    """What the stages after reading work on."""

    sample: Sample
    pixels: np.ndarray
    crop: Sample
    transform: TrainTransform


def write_images(root: Path, count: int, height: int, width: int) -> None:
    """Draw streets at a quarter of the size, enlarge them, and add a camera's noise, which PNG cannot compress."""
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


def draws(height: int, width: int) -> Iterator[tuple[tuple[int, int], Window]]:
    """Sizes and crops as the augmentation draws them."""
    rng = np.random.default_rng(0)
    while True:
        size = resized_size(height, width, int(rng.choice(PAPER_SHORTEST_EDGES)) * height // 1024)
        starts = [int(rng.integers(max(a - b, 0), endpoint=True)) for a, b in zip(size, CROP, strict=True)]
        yield (
            size,
            (slice(starts[0], min(starts[0] + CROP[0], size[0])), slice(starts[1], min(starts[1] + CROP[1], size[1]))),
        )


def resize_and_crop(sample: Sample, size: tuple[int, int], window: Window) -> None:
    """All of image and map, then the crop: what crop-first saves."""
    image = resize(sample.image.permute(1, 2, 0).numpy(), size)
    ids = Image.fromarray(sample.panoptic.numpy()).resize(size[::-1], Image.Resampling.NEAREST)
    np.ascontiguousarray(image[window]), np.ascontiguousarray(np.asarray(ids)[window])


def crop_and_resize(sample: Sample, size: tuple[int, int], window: Window) -> None:
    resize_window(sample.image.permute(1, 2, 0).numpy(), size, window)
    pick_window(sample.panoptic.numpy(), size, window)


def stages_of(
    png: CityscapesDataset, cached: CachedDataset, index: int, size: tuple[int, int], window: Window, reused: Reused
) -> dict[str, Callable[[], Any]]:
    """What is measured, on one image and one draw."""
    image_path, map_path = png.files(index)
    sample, pixels, crop, transform = reused
    jitter = transform.pipeline[1]
    return {
        "decode image (PNG)": partial(read_rgb, image_path, CURE),
        "decode map (PNG)": partial(read_map, map_path, CURE),
        "read item (PNG)": partial(png.read, index),
        "map item (cache)": partial(cached.read, index),
        "resize all, then crop": lambda: resize_and_crop(sample, size, window),
        "crop first": lambda: crop_and_resize(sample, size, window),
        "colour jitter": lambda: jitter.apply(pixels, **jitter.get_params()),
        "target": partial(build_target, crop, "panoptic"),
        "sample: PNG, resize all, then crop": lambda: resize_and_crop(png.read(index), size, window),
        "sample: PNG, crop first": lambda: crop_and_resize(png.read(index), size, window),
        "sample: cache, crop first": lambda: crop_and_resize(cached.read(index), size, window),
        "whole augmentation: PNG": lambda: transform(png.read(index)),
        "whole augmentation: cache": lambda: transform(cached.read(index)),
    }


def measure_stages(png: CityscapesDataset, cached: CachedDataset, rounds: int) -> dict[str, Spread]:
    """Every stage in turn, round by round: a change of the machine's speed meets all alike. One round warms up."""
    sample = png.read(0)
    pixels = sample.image.permute(1, 2, 0).numpy()[: CROP[0], : CROP[1]].copy()
    crop = TrainTransform(CROP, color_jitter=None)(sample)
    reused = Reused(sample, pixels, crop, TrainTransform(CROP))
    size_and_window = draws(*sample.panoptic.shape)
    for index in range(len(cached)):  # compares hashes once
        cached.read(index)
    times: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, stage in stages_of(png, cached, turn % len(png), *next(size_and_window), reused).items():
            start = time.perf_counter()
            stage()
            if turn:
                times.setdefault(name, []).append(time.perf_counter() - start)
    return {name: Spread.of(seconds) for name, seconds in times.items()}


def measure_loaders(root: Path, cache: Path, workers: list[int], rounds: int) -> dict[str, dict[int, float]]:
    """Images per second of the training loader, targets included; the median of some epochs after the first."""
    speeds: dict[str, dict[int, float]] = {"PNG": {}, "cache": {}}
    for count in workers:
        for name, folder in (("PNG", None), ("cache", cache)):
            data = CityscapesDataModule(root, batch_size=4, num_workers=count, cache=folder)
            data.setup("fit")
            loader, epochs = data.train_dataloader(), []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                images = sum(len(batch.images) for batch in loader)
                epochs.append(images / (time.perf_counter() - start))
            speeds[name][count] = statistics.median(epochs[1:])
    return speeds


def table(stages: dict[str, Spread], speeds: dict[str, dict[int, float]]) -> str:
    """All results in Markdown."""
    lines = ["| stage | ms | quartiles | images/s |", "|---|--:|--:|--:|"]
    lines += [
        f"| {k} | {v.median:.2f} | {v.low:.2f} to {v.high:.2f} | {1000 / v.median:.0f} |" for k, v in stages.items()
    ]
    lines += ["", "| workers | PNG, images/s | cache, images/s | factor |", "|--:|--:|--:|--:|"]
    for count, png in speeds["PNG"].items():
        cached = speeds["cache"][count]
        lines.append(f"| {count} | {png:.1f} | {cached:.1f} | {cached / png:.1f} |")
    return "\n".join([*lines, "", *(f"{name}: {factor:.1f}x" for name, factor in factors(stages).items())])


def factors(stages: dict[str, Spread]) -> dict[str, float]:
    """How many times faster, decoding left out and included."""

    def ratio(slow: str, fast: str) -> float:
        return stages[slow].median / stages[fast].median

    return {
        "crop first instead of resizing all": ratio("resize all, then crop", "crop first"),
        "the same with decoding": ratio("sample: PNG, resize all, then crop", "sample: PNG, crop first"),
        "cache and crop first instead of PNG and resizing all": ratio(
            "sample: PNG, resize all, then crop", "sample: cache, crop first"
        ),
        "cache instead of PNG, whole augmentation": ratio("whole augmentation: PNG", "whole augmentation: cache"),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="numbers of loading processes")
    parser.add_argument("--images", type=int, default=16, help="images to draw")
    parser.add_argument("--rounds", type=int, default=48, help="measurements of every stage")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, too")
    parser.add_argument("--quick", action="store_true", help="small images and few rounds, to see that it works")
    options = parser.parse_args(arguments)
    if options.images < 4 or options.rounds < 2 or min(options.workers) < 0:
        print("error: give at least 4 images, 2 rounds and 0 workers", file=sys.stderr)
        return 2
    height, width, images, rounds = 1024, 2048, options.images, options.rounds
    if options.quick:
        height, width, images, rounds = 128, 256, 4, 2
    torch.set_num_threads(1)  # as in a worker
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            root, cache = Path(scratch) / "png", Path(scratch) / "cache"
            write_images(root, images, height, width)
            png = CityscapesDataset(root, "train")
            stages = measure_stages(png, CachedDataset(png, cache, os.cpu_count() or 1), rounds)
            speeds = measure_loaders(root, cache, options.workers, 1 if options.quick else 4)
        print(f"{images} images of {width}x{height}, {os.cpu_count()} cores, one thread per process\n")
        print(table(stages, speeds))
        if options.json:
            result = {"stages_ms": {k: v._asdict() for k, v in stages.items()}, "loader_images_per_s": speeds}
            options.json.write_text(json.dumps({**result, "factors": factors(stages)}, indent=2))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
