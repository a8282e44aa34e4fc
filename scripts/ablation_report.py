"""Makes a report of training runs: a table of what every variant reaches and costs, and figures.

    python scripts/ablation_report.py RUNS... [--output report] [--size 1024x2048] [--rounds 5] [--threads N]
        [--device cpu] [--no-latency] [--reuse]

RUNS are folders of train.py's runs, or folders that hold such at any depth; finished or not. Writes report.html (one
file, opens anywhere), report.md, report.csv, the figures as PNG, and measurements.json.
Exit code 0: done, 2: wrong usage, or no run was found.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pem_lightning.ablation import measure_variants, read_runs, reuse_costs, tabulate, write_report
from pem_lightning.benchmark import Settings, parse_size
from pem_lightning.types import UserError


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(given)
    cache = options.output / "measurements.json"
    try:
        settings = Settings(
            size=parse_size(options.size), device=options.device, threads=options.threads, rounds=options.rounds
        )
        runs = read_runs(options.runs, say)
        tables = tabulate(runs, say)
        costs = reuse_costs(cache, tables, settings, latency=options.latency) if options.reuse else None
        if costs is None:
            costs = measure_variants(tables, settings, latency=options.latency, say=say)
            costs.save(cache)
        variants = sum(len(table.variants) for table in tables)
        command = shlex.join(["python", "scripts/ablation_report.py", *given])
        head = f"{len(runs)} runs, {variants} variants. Made by {command}, {datetime.now():%Y-%m-%d %H:%M}."
        written = write_report(tables, costs, options.output, head)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(runs)} runs, {variants} variants: {', '.join(path.name for path in written)} are in {options.output}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    defaults = Settings()
    height, width = defaults.size
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, or that hold some")
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder (default %(default)s)")
    parser.add_argument(
        "--size", default=f"{height}x{width}", help="height x width for GMACs and latency (default %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=defaults.rounds, help="measurements (default %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU")
    parser.add_argument("--device", default=defaults.device, help="cpu, cuda or auto (default %(default)s)")
    parser.add_argument(
        "--latency",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure it (parameters are counted anyway)",
    )
    parser.add_argument(
        "--reuse", action="store_true", help="the output's measurements, if they still fit all variants"
    )
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
