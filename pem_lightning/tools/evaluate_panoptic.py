"""Scores predictions in the COCO panoptic format exactly as panopticapi does, without panopticapi, in parallel.

    python scripts/evaluate_panoptic.py GT.json PRED.json
        [--gt-folder DIR] [--pred-folder DIR] [--workers N] [--json OUT]

PNGs are looked for in the folder that is named like the JSON. Exit code 2: a file is missing or broken.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pem_lightning.files import write_file
from pem_lightning.installation import tool_command
from pem_lightning.metrics.panoptic_files import FilesEvaluation, evaluate_panoptic_files
from pem_lightning.types import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog=tool_command("evaluate_panoptic"), description="Panoptic quality of files in the COCO panoptic format."
    )
    parser.add_argument("gt", type=Path, metavar="GT.json", help="the ground truth")
    parser.add_argument("prediction", type=Path, metavar="PRED.json", help="the prediction")
    parser.add_argument("--gt-folder", type=Path, help="of the ground truth's PNGs (default: GT)")
    parser.add_argument("--pred-folder", type=Path, help="of the prediction's PNGs (default: PRED)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 for none")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")
    parsed = parser.parse_args(arguments)
    try:
        result = evaluate_panoptic_files(
            parsed.gt, parsed.prediction, parsed.gt_folder, parsed.pred_folder, max(parsed.workers, 0)
        )
        if parsed.json:
            write_file(parsed.json, json.dumps(result.to_dict(), indent=2) + "\n")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    console.print(class_table(result))
    console.print(summary(result), highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
    return 0


def class_table(result: FilesEvaluation) -> Table:
    """One row per category, in percent; a dash where it does not occur."""
    quality = result.quality
    table = Table("class", "kind", title=f"{escape(result.info.name)}: {result.num_images} images", header_style="bold")
    for column in ("PQ", "SQ", "RQ", "TP", "FP", "FN"):
        table.add_column(column, justify="right", no_wrap=True)
    for k, c in enumerate(result.info.classes):
        values = (array[k] for array in (quality.pq_per_class, quality.sq_per_class, quality.rq_per_class))
        counts = (quality.true_positives[k], quality.false_positives[k], quality.false_negatives[k])
        kind = "thing" if c.is_thing else "stuff"
        table.add_row(escape(c.name), kind, *(percent(value) for value in values), *map(str, counts))
    return table


def summary(result: FilesEvaluation) -> str:
    """The averages, laid out as panopticapi prints them."""
    lines = [f"{'':10s}| {'PQ':>5s}  {'SQ':>5s}  {'RQ':>5s} {'N':>5s}", "-" * 38]
    for name, group in result.groups().items():
        pq, sq, rq = (percent(value) for value in group[:3])
        lines.append(f"{name:10s}| {pq:>5s}  {sq:>5s}  {rq:>5s} {group.num_classes:5d}")
    return "\n".join(lines)


def percent(value: float) -> str:
    """With one digit, a dash for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.1f}"
