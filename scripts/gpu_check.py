"""Does everything work on this GPU, and how fast? Tests, kernels, inference, a training step, and short trainings.

    python scripts/gpu_check.py [--output gpu_check] [--camvid data/CamVid] [--only inference step]

Needs torch and the packages of `make wheels`; at most eight minutes on one card, or --minutes. A part that fails or
takes too long does not keep the others from running, and one for which no time is left is skipped. Without a GPU, and
with --quick, everything is small, and what needs a GPU is skipped. gpu_check.md and gpu_check.json are written after
every result, with the logs beside them. Exit code 0: all parts did what they should, 1: one did not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
STATED_PQ = 60.0
"""Of a minute's training by the demo's recipe; all its 600 steps end at PQ 76.6 on a CPU."""
TRAIN_SECONDS, CAMVID_SECONDS = 60, 120
Line = dict[str, Any] | str
"""A row of a table, or what is said below it; one that begins with "failed" fails its part."""


class Part(NamedTuple):
    """A program and the seconds that it may take; it prints `Line`s as JSON, or `read` makes them of its text."""

    name: str
    command: list[str]
    seconds: float
    needs_gpu: bool = False
    read: Callable[[str], Iterator[Line]] | None = None


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cuda = torch.cuda.is_available()
    deadline = time.monotonic() + 60 * options.minutes
    report: dict[str, Any] = {"machine": describe(cuda), "parts": {}}
    for part in parts(options, cuda):
        if options.only and part.name not in options.only:
            continue
        left = deadline - time.monotonic()
        found: dict[str, Any] = {"status": "skipped: it needs a GPU", "seconds": 0.0, "lines": []}
        report["parts"][part.name] = found
        if part.needs_gpu and not cuda:
            pass
        elif left < part.seconds:
            found["status"] = f"skipped: it may take {part.seconds:.0f} s, of which {max(left, 0):.0f} s are left"
        else:
            print(f"{part.name}: {' '.join(part.command[1:])}", flush=True)
            run(part, found, options.output, lambda: write(report, options.output))
        print(f"{part.name}: {found['status']}, {found['seconds']:.0f} s", flush=True)
        write(report, options.output)
    print(f"\nWritten to {options.output / 'gpu_check.md'}")
    return int(any(not part["status"].startswith(("passed", "skipped")) for part in report["parts"].values()))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu_check"), help="folder for the report and the logs")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all parts may take together")
    parser.add_argument("--quick", action="store_true", help="everything small: whether it runs at all")
    parser.add_argument("--camvid", type=Path, metavar="FOLDER", help="also train two minutes on this data set")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="PART", help=f"of {', '.join(NAMES)}")
    options = parser.parse_args(arguments)
    if options.camvid and not options.camvid.is_dir():
        parser.error(f"--camvid {options.camvid} is no folder: give that of CamVid, see docs/data.md")
    if options.only and "camvid" in options.only and not options.camvid:
        parser.error("--only camvid needs --camvid FOLDER")
    options.output = options.output.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    return options


NAMES = ("tests", "kernels", "inference", "step", "train", "camvid", "compile")


def parts(options: argparse.Namespace, cuda: bool) -> Iterator[Part]:
    """What is run, in the order of `NAMES`: what may take longest comes last."""
    small = options.quick or not cuda

    def measure(name: str, seconds: float, *more: str, needs_gpu: bool = False) -> Part:
        command = [sys.executable, "-m", "scripts.benchmark.gpu", name, *(["--small"] if small else []), *more]
        return Part(name, command, seconds if cuda else 2 * seconds, needs_gpu)

    def train(name: str, seconds: int, *overrides: str, bar: tuple[str, float] | None = None) -> Part:
        folder = options.output / f"{name}_{time.strftime('%Y-%m-%d_%H-%M-%S')}"
        command = [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={folder}", *overrides, *NO_FILES]
        command += ["debug=profile", f"+trainer.max_time=00:00:{seconds // 60:02}:{seconds % 60:02}"]
        return Part(name, command, seconds + 60, read=lambda _: read_training(folder, bar))

    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    yield Part("tests", tests, 100, needs_gpu=True, read=lambda text: iter(text.strip().splitlines()[-1:]))
    yield measure("kernels", 45)
    yield measure("inference", 60)
    yield measure("step", 60)
    if small:
        few = ["scale=synthetic_small", "recipe.max_steps=3", "recipe.val_interval=3"]
        few += [f"dataset.root={options.output / 'scenes'}", "dataset.datamodule.num_train=8"]
        yield train("train", TRAIN_SECONDS, *few, "dataset.datamodule.num_val=2")
    else:
        steps = ["recipe.max_steps=600", "recipe.val_interval=600"]  # the demo's, validated at the end
        yield train("train", TRAIN_SECONDS, "dataset=synthetic", *steps, bar=("PQ", STATED_PQ))
    if options.camvid:
        photos = ["dataset=camvid", f"dataset.root={options.camvid.resolve()}", "recipe.val_interval=100000"]
        photos += ["trainer.precision=bf16-mixed"] if cuda else []
        few = ["recipe.max_steps=2", "+trainer.limit_val_batches=2", "dataset.num_workers=0"]
        yield train(
            "camvid", CAMVID_SECONDS, *photos, *(few if small else ["recipe.max_steps=1800", "dataset.num_workers=8"])
        )
    yield measure("compile", 90, "--seconds", "75", needs_gpu=True)


NO_FILES = (
    "logger=csv",
    *(f"callbacks.{name}=null" for name in ("last", "panels", "curves", "confusion")),
    "callbacks.best.save_weights_only=true",
)
"""Trainings write numbers and one network."""


def run(part: Part, found: dict[str, Any], output: Path, save: Callable[[], None]) -> None:
    """Run one part; everything that it prints goes to a file, and its lines into `found` as soon as they are there."""
    began, text, late = time.monotonic(), "", threading.Event()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    found["status"] = "cut off"  # as long as it runs
    log = output / f"{part.name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stderr=file, start_new_session=True, **pipes
        )

        def stop() -> None:
            late.set()
            kill(process)

        timer = threading.Timer(part.seconds, stop)
        timer.start()
        try:
            save()
            for line in process.stdout or ():
                print(line, end="", file=file, flush=True)
                text += line
                if part.read is None and line[:1] in '{"':
                    found["lines"].append(json.loads(line))
                found["seconds"] = round(time.monotonic() - began, 1)
                save()
            code = process.wait()
        finally:
            timer.cancel()
            kill(process)  # with whatever it started
    found["seconds"] = round(time.monotonic() - began, 1)
    try:
        found["lines"] += part.read(text) if part.read else ()
    except (OSError, KeyError) as error:
        found["lines"].append(f"failed: it left no results ({error})")
    broken = code or any(isinstance(line, str) and line.startswith("failed") for line in found["lines"])
    found["status"] = "took too long" if late.is_set() else f"failed ({code})" if broken else "passed"
    if found["status"] != "passed":
        found["log"] = log.read_text(errors="replace")[-1500:]


def kill(process: subprocess.Popen[str]) -> None:
    """End a part and the processes that it started."""
    if not hasattr(os, "killpg"):  # Windows
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_training(folder: Path, bar: tuple[str, float] | None) -> Iterator[Line]:
    """Quality, throughput, memory, and what every step waited for its data; `bar` is a metric and its least value."""
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "csv" / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in logged if row.get(name)]

    names = [name for name in ("PQ", "mIoU") if f"val/{name}" in metrics]
    row: dict[str, Any] = {name: round(metrics[f"val/{name}"], 2) for name in names}
    row["steps"] = metrics["step"]
    if rates := column("train/images_per_second"):
        row["images/s"] = round(median(rates), 1)
    profile = (folder / "fit-profile.txt").read_text()
    if wait := re.search(r"train_dataloader_next\s*\|\s*([^|]+?)\s*\|", profile):
        row["data wait, ms a step"] = round(1000 * float(wait[1]), 2)
    if memory := column("train/gpu_memory_gib"):
        row["GPU memory, GiB"] = round(max(memory), 2)
    yield row
    if bar and not row[bar[0]] >= bar[1]:
        yield f"failed: {bar[0]} {row[bar[0]]} after {row['steps']} steps is below {bar[1]}"


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


def write(report: dict[str, Any], output: Path) -> None:
    """Both files."""
    (output / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "gpu_check.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report as people read it."""
    lines = ["# GPU check", "", ", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    for name, part in report["parts"].items():
        lines += [f"## {name}: {part['status']}, {part['seconds']:.0f} s", ""]
        for columns, rows in groupby(part["lines"], lambda line: tuple(line) if isinstance(line, dict) else ()):
            if columns:
                cells = [columns, ["---"] + ["--:"] * (len(columns) - 1), *(row.values() for row in rows)]
                lines += [f"| {' | '.join(map(str, row))} |" for row in cells]
            else:
                lines += [f"- {line}" for line in rows]
            lines.append("")
        if "log" in part:
            lines += [f"```\n{part['log'].strip()}\n```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # which end the running part as well
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    sys.exit(main())
