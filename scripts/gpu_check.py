"""Does everything work on this GPU, and how fast? Tests, kernels, inference, a training step, and a short training.

    python scripts/gpu_check.py [--output gpu_check] [--only inference training]

At most eight minutes on one card. A part that fails or takes too long does not keep the others from running; without a
GPU each runs in a small size, and what needs one is skipped. Writes gpu_check.md and gpu_check.json with the logs
beside them. Exit code 0: all parts did what they should, 1: one did not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
STATED_PQ = 70.0  # of `make demo`'s training on a GPU


class Part(NamedTuple):
    """A program, and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for the report and the logs")
    cuda = torch.cuda.is_available()
    commands = list(parts(cuda, Path("gpu_check")))
    parser.add_argument("--only", nargs="+", choices=[part.name for part in commands], help="run these parts alone")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": describe(cuda), "parts": {}}
    if cuda:
        report["roofline"] = roofline()
    for part in parts(cuda, output):
        if options.only and part.name not in options.only:
            continue
        print(f"{part.name}: {' '.join(part.command[1:])}", flush=True)
        report["parts"][part.name] = found = run(part, output)
        print(f"  {found['status']} after {found['seconds']:.0f} s", flush=True)
        if part.name == "train" and found["status"] == "passed":
            found |= read_training(output / "train", cuda)
        (output / "gpu_check.json").write_text(json.dumps(report, indent=2))
        (output / "gpu_check.md").write_text(markdown(report))
    print(f"\nWritten to {options.output / 'gpu_check.md'}")
    return int(any(part["status"] != "passed" for part in report["parts"].values()))


def parts(cuda: bool, output: Path) -> Iterator[Part]:
    """What is run, each in a process of its own."""
    benchmark = [sys.executable, "-m", "scripts.benchmark"]
    yield Part(
        "tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"], 150
    )
    size = [] if cuda else ["--size", "64x128"]
    yield Part("kernels", [*benchmark, "kernels", "--rounds", "3", *size], 60)
    few = ["--backbones", "stdc1", *size]
    precisions = ["--precisions", "float32", "bfloat16", *(["float16"] if cuda else [])]
    yield Part("inference", [*benchmark, "inference", "--rounds", "10" if cuda else "1", *few, *precisions], 90)
    if cuda:  # the first image of a size is compiled
        graphs = ["--compile", "reduce-overhead", "--no-memory", "--no-equality", "--rounds", "10"]
        yield Part("graphs", [*benchmark, "inference", *graphs, *few, "--precisions", "float32", "bfloat16"], 150)
    crops = ["--size", "512x1024", "--batch", "8"] if cuda else size
    step = [*few[:2], *crops, "--precisions", "float32", "bfloat16", "--no-equality"]
    yield Part("training", [*benchmark, "training", "--rounds", "5" if cuda else "1", *step], 120)
    small = ["scale=synthetic_small", "recipe.max_steps=2", "recipe.val_interval=2"]
    train = [sys.executable, str(ROOT / "train.py"), f"output_dir={output / 'train'}", "logger=csv"]
    yield Part("train", [*train, *([] if cuda else small)], 240)


def run(part: Part, output: Path) -> dict[str, Any]:
    """Run one part; its output goes to a file and, the end of it, into the report."""
    began = time.monotonic()
    log = output / f"{part.name}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as errors:
        try:
            done = subprocess.run(
                part.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=part.seconds,
            )
            text, code = done.stdout, done.returncode
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
            code = 124
    with log.open("a") as file:
        file.write(text)
    nothing_to_test = part.name == "tests" and code == 5
    status = "passed" if code == 0 or nothing_to_test else "took too long" if code == 124 else f"failed ({code})"
    return {"status": status, "seconds": round(time.monotonic() - began, 1), "output": text[-8000:]}


def read_training(folder: Path, cuda: bool) -> dict[str, Any]:
    """Quality, steps and images per second of the short training."""
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["train/images_per_second"]) for row in rows if row.get("train/images_per_second")]
    memory = [float(row["train/gpu_memory_gib"]) for row in rows if row.get("train/gpu_memory_gib")]
    found: dict[str, Any] = {"metrics": {name: value for name, value in metrics.items() if name != "per_class"}}
    found |= {"images_per_second": sorted(rates)[len(rates) // 2] if rates else None}
    found |= {"gpu_memory_gib": max(memory, default=None)}
    if cuda and metrics["val/PQ"] < STATED_PQ:
        found["status"] = f"failed: PQ below {STATED_PQ}"
    return found


def describe(cuda: bool) -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processors": os.cpu_count(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
        facts |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts


def roofline() -> dict[str, float]:
    """What this card reaches: a large copy (bytes read plus written) and large matrix products of random numbers."""

    def fastest(work: Any) -> float:
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1000)
        return min(times)

    memory = torch.empty(2**28, device="cuda")
    target = torch.empty_like(memory)
    found = {"copy, GB/s": 2 * memory.numel() * 4 / fastest(lambda: target.copy_(memory)) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
        found[f"{dtype} product, TFLOP/s".removeprefix("torch.")] = 2 * 8192**3 / fastest(lambda a=a, b=b: a @ b) / 1e12
    return {name: round(value, 1) for name, value in found.items()}


def markdown(report: dict[str, Any]) -> str:
    """The report as people read it."""
    lines = ["# GPU check", "", ", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    if "roofline" in report:
        lines += ["Measured ceilings: " + ", ".join(f"{key} {value}" for key, value in report["roofline"].items()), ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        facts = {key: value for key, value in part.items() if key not in ("status", "seconds", "output")}
        lines += [f"{key}: {json.dumps(value)}\n" for key, value in facts.items()]
        lines += [
            part["output"].strip() if "| --" in part["output"] else f"```\n{part['output'].strip()[-1500:]}\n```",
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
