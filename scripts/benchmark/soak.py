"""A long run: do memory, open files and threads stay flat? Training, then predictions, then predictions at once.

Training has two workers, validations, checkpoints and two loggers. One `Predictor` then sees images of changing sizes
in turn, and from many threads at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pem_lightning import Predictor
from pem_lightning.types import UserError
from scripts.benchmark import common
from scripts.benchmark.common import Times

ROOT = Path(__file__).parents[2]
TENTHS = 10
LARGEST_GROWTH = 0.05  # of memory, from the second tenth to the last
SPARE = {"memory, MiB": 32.0, "open files": 4.0, "threads": 4.0}  # what may come and go in any case
THREADS = 8  # of the predictions at once
SIZES = 20  # of the images: few enough for every thread to meet nearly all within the first tenth


class Usage(NamedTuple):
    """Of a process and all its children."""

    memory: float  # MiB, proportional: what processes share is counted once
    files: float
    threads: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=common.positive, default=5000, help="of training")
    parser.add_argument("--predictions", type=common.positive, default=2000, help="in turn, and again several at once")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Returns a report and no times by stage.

    Raises:
        UserError: psutil is missing, a part fails, or something grows.
    """
    rows, grown = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for name, command, begun in commands(Path(scratch), options):
            common.say(name)
            samples, seconds = watch(command, options.every, begun)
            cells = []
            for kind, values in zip(SPARE, np.array(samples).T, strict=True):
                tenths = [float(np.median(part)) for part in np.array_split(values, TENTHS)]
                if tenths[-1] > tenths[1] * (1 + LARGEST_GROWTH) + SPARE[kind]:
                    grown.append(f"{kind} of {name}: {tenths[1]:.0f} to {tenths[-1]:.0f}")
                cells.append(f"{tenths[0]:.0f} / {tenths[1]:.0f} / {tenths[-1]:.0f}")
            rows.append((name, f"{seconds:.0f}", str(len(samples)), *cells))
    columns = ("first / second / last tenth", "seconds", "looks", *SPARE)
    report = f"{common.describe('Soak', options)}\n\n{common.table(columns, rows)}\n"
    if grown:
        print(report)
        raise UserError(f"not flat after the first tenth: {'; '.join(grown)}")
    return report, {}


def commands(folder: Path, options: argparse.Namespace) -> list[tuple[str, list[str], Path]]:
    """What is run, one after the other: name, a program with its arguments, and a file that is there once it is warm.

    That is after the first validation and checkpoint (a tenth of the steps), or after the first image.
    """
    interval = max(options.steps // 10, 1)
    overrides = [
        *("scale=synthetic_small", "decoder_layers=1", "dataset.num_workers=2", "trainer=cpu", "logger=tensorboard"),
        *("recipe.global_batch_size=2", "recipe.num_points=64", "recipe.train_transform.crop_size=[32,64]"),
        *(f"recipe.max_steps={options.steps}", f"recipe.val_interval={interval}"),
        *(f"recipe.checkpoint_interval={interval}", f"dataset.root={folder / 'data'}", "dataset.datamodule.num_val=8"),
        *("dataset.datamodule.num_train=32", f"output_dir={folder / 'run'}", f"hydra.run.dir={folder / 'hydra'}"),
    ]
    checkpoint = str(folder / "run" / "checkpoints" / "last.ckpt")
    predict = [sys.executable, "-m", "scripts.benchmark.soak", checkpoint, str(options.predictions)]
    one, several = folder / "one", folder / "several"
    return [
        (f"{options.steps} steps", [sys.executable, "train.py", *overrides], Path(checkpoint)),
        (f"{options.predictions} predictions", [*predict, "1", str(one)], one),
        (f"{options.predictions} predictions, {THREADS} at once", [*predict, str(THREADS), str(several)], several),
    ]


def watch(command: list[str], every: float, begun: Path) -> tuple[list[Usage], float]:
    """Run a program and look at it from time to time once a file is there.

    Returns:
        What was seen, at least a look per tenth, and the seconds of the whole run.
    """
    try:
        import psutil
    except ImportError as error:
        raise UserError("the soak needs psutil: pip install -r requirements-bench.txt") from error
    samples: list[Usage] = []
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while child.poll() is None:
                with suppress(psutil.Error):  # a process has ended meanwhile
                    if begun.exists():
                        samples.append(_look(psutil.Process(child.pid)))
                time.sleep(every)
        finally:
            child.kill()
        if child.returncode:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{' '.join(command)} has failed: {last}")
    if len(samples) < TENTHS:
        raise UserError(f"only {len(samples)} looks, which say nothing: run it longer, or look more often (--every)")
    return samples, time.monotonic() - began


def _look(process: Any) -> Usage:
    family = [process, *process.children(recursive=True)]
    memory = sum(getattr(m := one.memory_full_info(), "pss", m.rss) for one in family)
    return Usage(memory / 2**20, sum(one.num_fds() for one in family), sum(one.num_threads() for one in family))


def predict(checkpoint: str, count: int, threads: int, begun: Path) -> None:
    """Predict black images of changing sizes, with so many at once; `begun` is made after the first.

    The sizes return, for memory is only flat once all have been seen: allocators keep what a larger image needed.
    """
    predictor, rng = Predictor(checkpoint, device="cpu"), np.random.default_rng(0)
    shapes = rng.choice(rng.integers(32, 320, (SIZES, 2)), count)
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda shape: predictor(np.zeros((*shape, 3), np.uint8)).overlay(), shapes):
            begun.touch()


if __name__ == "__main__":
    predict(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
