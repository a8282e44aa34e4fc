"""Measures PEM's fast path against the authors' algorithm and other networks, all in turn in one process.

    python scripts/benchmark.py [--size 1024x2048] [--precisions float32,bfloat16] [--compile none,default]
        [--peers mask2former_r50,segformer_b0] [--kernels] [--checkpoint FILE] [--image FILE] [--output DIR]
    python scripts/benchmark.py --train [--size 256x512] [--batch 2] [--segments 15] [--num-points 12544] ...

The second measures a training step by stage, against the authors'. Writes benchmark.json, benchmark.md and
benchmark.png. Needs no data set, and a network's weights only if you have some. Exit code 0: done, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.benchmark import (
    Settings,
    draw_latencies,
    draw_steps,
    lineup,
    parse_size,
    print_memory,
    run_benchmark,
    to_markdown,
    training,
)
from pem_lightning.benchmark.peers import PEERS
from pem_lightning.benchmark.training import TrainingSettings, run_training_benchmark
from pem_lightning.files import write_file
from pem_lightning.types import UserError

AnySettings = Settings | TrainingSettings


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(given)
    try:
        settings = read_settings(options)
        if options.measure_memory is not None:
            measure_memory(settings, options)
            return 0
        table = measure(settings, options, given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    print(f"benchmark.json, benchmark.md and benchmark.png are in {options.output}")
    return 0


def measure(settings: AnySettings, options: argparse.Namespace, given: list[str]) -> str:
    """Measure, and write the files; returns the tables."""
    command = shlex.join(["python", "scripts/benchmark.py", *given])
    child = [sys.executable, str(Path(__file__).resolve()), *given]

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def child_command(name: str, threshold: float = options.threshold) -> list[str]:
        return [*child, "--measure-memory", name, "--threshold", repr(threshold)]

    if isinstance(settings, TrainingSettings):
        result = run_training_benchmark(settings, command=command, child_command=child_command, say=say)
        table, picture = training.to_markdown(result), draw_steps(result)
    else:
        result = run_benchmark(settings, command=command, child_command=child_command, say=say)
        table, picture = to_markdown(result), draw_latencies(result)
    write_file(options.output / "benchmark.json", json.dumps(result, indent=2) + "\n")
    write_file(options.output / "benchmark.md", table)
    write_file(options.output / "benchmark.png", picture)
    return table


def measure_memory(settings: AnySettings, options: argparse.Namespace) -> None:
    """What this script does in the process of its own that a contestant's memory is measured in."""
    lineup.set_threads(settings.threads)
    if isinstance(settings, TrainingSettings):
        print_memory(training.measure_memory(settings, options.measure_memory))
    else:
        print_memory(lineup.measure_memory(settings, options.measure_memory, options.threshold))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", action="store_true", help="measure a training step instead of inference")

    def add(option: str, text: str, **settings: Any) -> None:
        parser.add_argument(f"--{option}", help=text + _defaults(option), **settings)

    def names(option: str, text: str) -> None:
        add(option, text, type=_split, metavar="A,B")

    names("backbones", "PEM's")
    names("contestants", "of straightforward, library, fast; with --train of straightforward, ours")
    names("precisions", "of the fast path and the peers, with --train of both paths: float32, bfloat16, float16")
    names("compile", "of the fast path, with --train of ours: none, default, reduce-overhead, max-autotune")
    names("peers", f"other networks, with requirements-bench.txt: all, none, {', '.join(PEERS)}")
    add("size", "height x width of the images")
    add("batch", "images at once", type=int)
    add("segments", "target masks per image", type=int)
    add("num-points", "at which masks are compared", type=int)
    add("device", "cpu, cuda or auto")
    add("threads", "of PyTorch on the CPU", type=int)
    add("rounds", "measurements", type=int)
    add("warmup", "rounds before them", type=int)
    add("checkpoint", "one of train.py's, instead of random weights", type=Path)
    add("image", "a photograph, brought to --size, instead of noise", type=Path)
    add("kept-queries", "with random weights, how many queries panoptic post-processing looks at", type=int)
    for option, text in (
        ("memory", "measure peak memory, each contestant in its own process"),
        ("equality", "compare results, with --train losses and gradients, with the straightforward path's"),
        ("kernels", "compare the kernels of deformable convolution and attention"),
    ):
        add(option, text, action=argparse.BooleanOptionalAction)
    parser.add_argument("--small-ceilings", action="store_true", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder (default %(default)s)")
    parser.add_argument("--measure-memory", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, default=0.8, help=argparse.SUPPRESS)
    return parser


def read_settings(options: argparse.Namespace) -> AnySettings:
    """What is given; the rest is left to the settings' own defaults."""
    kind, other = (TrainingSettings, Settings) if options.train else (Settings, TrainingSettings)
    given = {name: value for name, value in vars(options).items() if value is not None}
    names = {field.name for field in fields(kind)}
    for name in sorted(given.keys() & ({field.name for field in fields(other)} - names)):
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} does not go with --train" if options.train else f"{option} goes with --train only")
    if options.checkpoint is not None and options.backbones is not None:
        raise UserError("--backbones does not go with --checkpoint, which has its own: leave it out")
    if options.image is not None and not options.image.is_file():
        raise UserError(f"--image {options.image} does not exist: check the path")
    if "size" in given:
        given["size"] = parse_size(options.size)
    return kind(**{name: value for name, value in given.items() if name in names})


def _defaults(option: str) -> str:
    """Of inference and of training, as the help says them."""
    name = option.replace("-", "_")
    inference, train = (_show(getattr(kind, name, None)) for kind in (Settings, TrainingSettings))
    if not hasattr(Settings, name):
        return f" (only with --train, default {train})"
    parts = [f"default {inference}"] if inference else []
    if not hasattr(TrainingSettings, name):
        parts.append("not with --train")
    elif train != inference:
        parts.append(f"with --train {train}")
    return f" ({', '.join(parts)})" if parts else ""


def _show(value: object) -> str:
    """A default as one would give it."""
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    return "" if value is None else str(value)


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
