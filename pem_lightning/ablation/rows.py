"""The report's data as flat rows, for csv files and DataFrames."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pem_lightning.ablation.measure import Costs, Measurement
from pem_lightning.ablation.table import METRICS, Table, Variant

ALL_METRICS = tuple(dict.fromkeys(name for columns in METRICS.values() for name in columns.values()))

COLUMNS = (
    *("dataset", "task", "setting", "variant", "is_default", "backbone", "num_layers", "num_queries"),
    *("seeds", "step", "max_steps"),
    *(f"{name}{suffix}" for name in ALL_METRICS for suffix in ("", "_std")),
    *("difference", "parameters_m", "gmacs", "latency_ms", "latency_low_ms", "latency_high_ms", "note"),
)
"""Columns of report.csv; what is not known is empty there, and None in `variant_rows`.

dataset, task: names.
setting: what a table's runs share: batch, crops, and changes against the default experiment.
variant: what it changes against the default, which is called PEM.
is_default: true for PEM.
backbone, num_layers, num_queries: of the network.
seeds: how many runs the numbers are of.
step: of the validation that the numbers are of, the last that all seeds share; empty without a validation.
max_steps: how many steps the runs were meant to take; less than that in `step` means unfinished.
PQ, PQ_things, PQ_stuff, mIoU, AP, AP50: mean over the seeds in percent, and sample standard deviation (`_std`).
difference: of the task's main metric (PQ, mIoU, AP) to the default's, both after the same number of steps.
parameters_m: millions of trainable numbers.
gmacs: giga multiply-accumulates per image by the convention of the paper's tables (every layer's masks in full).
latency_ms, latency_low_ms, latency_high_ms: of the network alone: median and quartiles, milliseconds per image.
note: why something could not be measured.
"""


def variant_rows(tables: Iterable[Table], costs: Costs | None = None) -> list[dict[str, Any]]:
    """One row per variant, with `COLUMNS`.

    Args:
        tables: of `tabulate`.
        costs: of `measure_variants`.
    """
    costs = costs or Costs()
    return [_row(table, variant, costs.of(variant)) for table in tables for variant in table.variants]


def _row(table: Table, variant: Variant, measured: Measurement) -> dict[str, Any]:
    run = variant.runs[0]
    row: dict[str, Any] = {
        "dataset": run.dataset,
        "task": run.task,
        "setting": table.scale,
        "variant": variant.name,
        "is_default": variant.is_default,
        "backbone": run.backbone,
        "num_layers": run.config["network"].get("num_layers"),
        "num_queries": run.config["network"].get("num_queries"),
        "seeds": len(variant.counted),
        "step": variant.step,
        "max_steps": run.max_steps,
    }
    for name in ALL_METRICS:
        statistic = variant.statistic(name)
        row[name], row[f"{name}_std"] = (statistic.mean, statistic.std) if statistic else (None, None)
    latency = measured.latency_ms
    return row | {
        "difference": table.difference(variant),
        "parameters_m": measured.parameters_m,
        "gmacs": measured.gmacs,
        "latency_ms": latency.median if latency else None,
        "latency_low_ms": latency.low if latency else None,
        "latency_high_ms": latency.high if latency else None,
        "note": measured.note,
    }


def curve_rows(tables: Iterable[Table], metric: str | None = None) -> list[dict[str, Any]]:
    """Learning curves, one row per validation: dataset, task, setting, variant, seed, step, metric, value in percent.

    Args:
        tables: of `tabulate`.
        metric: as the log calls it, but for its `val/`; None for each task's main one.
    """
    return [
        {
            "dataset": run.dataset,
            "task": run.task,
            "setting": table.scale,
            "variant": variant.name,
            "seed": run.seed,
            "step": step,
            "metric": metric or run.metric,
            "value": value,
        }
        for table in tables
        for variant in table.variants
        for run in variant.runs
        for step, value in run.validations(metric or run.metric).items()
    ]
