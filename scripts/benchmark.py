"""Measures PEM's fast path against the authors' algorithm and other networks, all in turn in one process.

    python scripts/benchmark.py [--size 1024x2048] [--precisions float32,bfloat16] [--compile none,default]
        [--peers mask2former_r50,segformer_b0] [--kernels] [--checkpoint FILE] [--image FILE] [--output DIR]

Writes benchmark.json, benchmark.md and benchmark.png. Needs no data set, and a network's weights only if you have some.
Exit code 0: done, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.benchmark import Settings, draw_latencies, parse_size, print_memory, run_benchmark, to_markdown
from pem_lightning.benchmark.lineup import measure_memory, set_threads
from pem_lightning.benchmark.peers import PEERS
from pem_lightning.errors import UserError
from pem_lightning.files import write_file


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(given)
    try:
        settings = read_settings(options)
        if options.measure_memory is not None:
            set_threads(settings.threads)
            print_memory(measure_memory(settings, options.measure_memory, options.threshold))
            return 0
        script = str(Path(__file__).resolve())
        result = run_benchmark(
            settings,
            command=shlex.join(["python", "scripts/benchmark.py", *given]),
            child_command=lambda name, threshold: [
                *(sys.executable, script, *given, "--measure-memory", name, "--threshold", repr(threshold))
            ],
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
        table = to_markdown(result)
        write_file(options.output / "benchmark.json", json.dumps(result, indent=2) + "\n")
        write_file(options.output / "benchmark.md", table)
        write_file(options.output / "benchmark.png", draw_latencies(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table)
    print(f"benchmark.json, benchmark.md and benchmark.png are in {options.output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def names(option: str, default: tuple[str, ...] | None, text: str) -> None:
        parser.add_argument(f"--{option}", type=_split, default=default, metavar="A,B", help=text)

    names("backbones", None, f"PEM's backbones (default {','.join(defaults.backbones)})")
    names("contestants", defaults.contestants, "PEM's paths: straightforward, library, fast")
    names("precisions", defaults.precisions, "of the fast path and the peers: float32, bfloat16, float16")
    names("compile", defaults.compile, "of the fast path: none, default, reduce-overhead, max-autotune")
    names("peers", (), f"other networks, with requirements-bench.txt: all, none, {', '.join(PEERS)}")
    parser.add_argument("--size", default="1024x2048", help="height x width of the image (default %(default)s)")
    parser.add_argument("--batch", type=int, default=defaults.batch, help="images at once (default %(default)s)")
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda or auto (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="measurements (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=defaults.warmup, help="rounds before them (default %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="one of train.py's, instead of random weights")
    parser.add_argument("--image", type=Path, help="a photograph, brought to --size, instead of noise")
    parser.add_argument(
        "--kept-queries",
        type=int,
        default=defaults.kept_queries,
        help="with random weights, how many queries panoptic post-processing looks at (default %(default)s)",
    )
    for option, text in (
        ("memory", "measure peak memory, each contestant in its own process"),
        ("equality", "compare the fast path's results with the straightforward one's"),
        ("kernels", "compare the kernels of deformable convolution and attention"),
    ):
        default = getattr(defaults, option)
        parser.add_argument(f"--{option}", action=argparse.BooleanOptionalAction, default=default, help=text)
    parser.add_argument("--small-ceilings", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("benchmark"), help="folder (default %(default)s)")
    parser.add_argument("--measure-memory", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, default=0.8, help=argparse.SUPPRESS)
    return parser


def read_settings(options: argparse.Namespace) -> Settings:
    if options.checkpoint is not None and options.backbones is not None:
        raise UserError("--backbones does not go with --checkpoint, which has its own: leave it out")
    if options.image is not None and not options.image.is_file():
        raise UserError(f"--image {options.image} does not exist: check the path")
    same = ("batch", "precisions", "compile", "contestants", "peers", "device", "threads", "rounds", "warmup")
    same += ("checkpoint", "image", "kept_queries", "memory", "equality", "kernels", "small_ceilings")  # type: ignore
    return Settings(
        backbones=options.backbones or Settings.backbones,
        size=parse_size(options.size),
        **{name: getattr(options, name) for name in same},
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
