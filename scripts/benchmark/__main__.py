"""Measures inference, a training step, data loading and kernels; see docs/benchmarks.md.

    python -m scripts.benchmark COMMAND [options]; --help lists the commands

Prints tables in Markdown; with --output FOLDER they, and a picture of stages, are written too. Only efficiency,
readout and camvid need a data set, and the first two a trained network. Exit code 0: done, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

if not __package__:  # started as `python scripts/benchmark`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pem_lightning.files import write_file
from pem_lightning.processes import stop_in_order
from pem_lightning.types import UserError
from scripts.benchmark import (
    camvid,
    common,
    compare,
    data,
    efficiency,
    inference,
    kernels,
    readout,
    runtimes,
    soak,
    training,
)

COMMANDS = {
    "inference": inference,
    "training": training,
    "data": data,
    "kernels": kernels,
    "compare": compare,
    "runtimes": runtimes,
    "soak": soak,
    "efficiency": efficiency,
    "readout": readout,
    "camvid": camvid,
}


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        report, times = COMMANDS[options.command].run(options)
        given = sys.argv[1:] if arguments is None else arguments
        report = f"`python -m scripts.benchmark {shlex.join(given)}`\n\n{report}"
        if options.output:
            write_file(options.output / f"{options.command}.md", report)
            if times:
                write_file(options.output / f"{options.command}.png", common.draw(times, report.splitlines()[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.benchmark", description=__doc__.splitlines()[0])
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").splitlines()[0]
        shown: Any = {"help": summary, "description": summary}
        command = commands.add_parser(name, **shown, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        module.add_arguments(command)
        command.add_argument("--rounds", type=common.positive, default=5, help="measurements")
        command.add_argument("--warmup", type=int, default=1, help="rounds before them")
        command.add_argument("--device", choices=devices, default=devices[-1], help="where networks run")
        command.add_argument("--threads", type=common.positive, help="of PyTorch on the CPU")
        command.add_argument("--output", type=Path, help="folder for the tables and a picture")
    return parser


if __name__ == "__main__":
    with stop_in_order():
        sys.exit(main())
