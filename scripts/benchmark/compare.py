"""Another checkout of this project beside this one, on the CPU: inference, training steps and loading, in turns.

Each runs in a process of its own (`worker.py`), with the same weights, images and random seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from pem_lightning.types import UserError
from scripts.benchmark import common, data, training
from scripts.benchmark.common import Times

ROOT = Path(__file__).parents[2]
BACKBONES = ("resnet50", "stdc1")
PRECISIONS = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repo", type=Path, help="the other checkout, of any age")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS, help="of inference")
    parser.add_argument("--size", type=common.parse_size, default=(1024, 2048), help="HEIGHTxWIDTH of whole images")
    parser.add_argument("--training-size", type=common.parse_size, default=(256, 512), help="HEIGHTxWIDTH of crops")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Time both checkouts; returns a report and no times by stage.

    Raises:
        UserError: there is no checkout, or something fails in it.
    """
    if not (options.repo / "pem_lightning").is_dir():
        raise UserError(f"{options.repo} is no checkout of this project: give the folder that holds pem_lightning")
    names = [f"inference {backbone} {precision}" for backbone in BACKBONES for precision in options.precisions]
    names += [*(f"training {backbone}" for backbone in BACKBONES), "loader"]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    hashes: dict[str, set[str]] = {name: set() for name in names}
    with TemporaryDirectory() as folder:
        write_inputs(Path(folder), options)
        program = [sys.executable, str(Path(__file__).with_name("worker.py"))]
        workers = [
            subprocess.Popen(
                [*program, str(root), folder, str(torch.get_num_threads())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for root in (options.repo, ROOT)
        ]
        try:
            for turn in range(-max(options.warmup, 1), options.rounds):
                common.say("warming up" if turn < 0 else f"round {turn + 1} of {options.rounds}")
                for name in names:
                    for side in (0, 1) if turn % 2 else (1, 0):
                        began = time.perf_counter()
                        hashes[name].add(ask(workers[side], name))
                        if turn >= 0:
                            times[name][side].append(time.perf_counter() - began)
        finally:
            for worker in workers:
                worker.kill()
    rows = []
    for name, (other, this) in times.items():
        low, median, high = np.quantile(np.divide(this, other), (0.25, 0.5, 0.75))
        share = f"{median:.3f} ({low:.3f} to {high:.3f})"
        equal = "yes" if len(hashes[name]) == 1 else "no"
        rows.append((name, f"{np.median(other):.4g}", f"{np.median(this):.4g}", share, equal))
    columns = ("", "other, s", "this, s", "this / other", "equal to the bit")
    facts = f"This checkout beside {options.repo}, images of {options.size[0]}x{options.size[1]}"
    return f"{common.describe(facts, options)}\n\n{common.table(columns, rows)}\n", {}


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Weights, images, a batch to learn from, and files like those of Cityscapes."""
    images = torch.randn(1, 3, *options.size, generator=torch.Generator().manual_seed(0))
    thresholds = {}
    for backbone in BACKBONES:
        network = common.random_network(backbone)
        torch.save(network.state_dict(), folder / f"{backbone}.pt")
        with torch.no_grad():
            thresholds[backbone] = common.choose_threshold(network(images).class_logits[0])
    torch.save((images, thresholds), folder / "images.pt")
    batch = argparse.Namespace(batch=2, segments=15, size=options.training_size, device="cpu")
    crops, targets = training.draw_batch(batch)
    torch.save((crops, [tuple(target) for target in targets]), folder / "batch.pt")
    data.write_images(folder / "cityscapes", 8, *options.size)


def ask(worker: subprocess.Popen[str], name: str) -> str:
    """Have something done; returns a hash of what it made the first time."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(name, file=worker.stdin, flush=True)
    answer = worker.stdout.readline().strip()
    if not answer:
        raise UserError(f"{name} has failed: see above")
    return answer
