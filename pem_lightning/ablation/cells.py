"""What the report's tables show, as text and as numbers to sort by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from pem_lightning.ablation.measure import Costs
from pem_lightning.ablation.table import Statistic, Table, Variant

MISSING = "–"


class Cell(NamedTuple):
    """Of a table.

    Attributes:
        text: to read.
        value: to sort by; None sorts last.
    """

    text: str
    value: int | float | str | None = None


class Column(NamedTuple):
    """Of a table.

    Attributes:
        head: its title.
        meaning: in a few words.
        cells: one per row.
        less_is_better: whether sorting begins with the smallest.
    """

    head: str
    meaning: str
    cells: list[Cell]
    less_is_better: bool = False


def columns_of(table: Table, costs: Costs) -> list[Column]:
    """The columns of a table of variants; those of which nothing is known are left out."""
    variants = table.variants
    main, *others = table.columns.items()
    names = [Cell(variant.name, variant.name) for variant in variants]
    columns = [Column("variant", "", names, True)]
    columns.append(Column(main[0], "percent", [_statistic(v.statistic(main[1])) for v in variants]))
    if table.default is not None and len(variants) > 1:
        differences = [Cell(MISSING) if (d := table.difference(v)) is None else Cell(_signed(d), d) for v in variants]
        columns.append(Column("difference", "points", differences))
    for head, metric in others:
        columns.append(Column(head, "percent", [_statistic(v.statistic(metric)) for v in variants]))

    def cost(head: str, meaning: str, cell: Callable[[Variant], Cell]) -> None:
        cells = [cell(variant) for variant in variants]
        if any(c.value is not None for c in cells):
            columns.append(Column(head, meaning, cells, True))

    cost("parameters", "millions", lambda v: _number(costs.of(v).parameters_m, 2))
    cost("GMACs", "per image", lambda v: _number(costs.of(v).gmacs, 1))
    cost("latency", "ms: median (quartiles)", lambda v: _latency(v, costs))
    columns.append(Column("seeds", "", [Cell(str(len(v.counted)), len(v.counted)) for v in variants]))
    columns.append(Column("steps", "", [Cell(v.progress, _shortest(v)) for v in variants]))
    return columns


def run_columns(table: Table) -> list[Column]:
    """The columns of a table of all runs."""
    pairs = [(variant, run) for variant in table.variants for run in variant.runs]
    last = [list(run.validations(run.metric).items())[-1:] for _, run in pairs]
    return [
        Column("variant", "", [Cell(v.name, v.name) for v, _ in pairs], True),
        Column("seed", "", [Cell(str(run.seed), run.seed) for _, run in pairs], True),
        Column(
            table.example.metric,
            "percent, last validation",
            [Cell(f"{found[0][1]:.1f}", found[0][1]) if found else Cell(MISSING) for found in last],
        ),
        Column(
            "validated",
            "after so many steps",
            [Cell(str(found[0][0]), found[0][0]) if found else Cell("never") for found in last],
        ),
        Column("steps", "done", [Cell(run.progress.removesuffix(" steps"), run.step) for _, run in pairs]),
        Column("counts", "in the table above", [Cell("yes" if run in v.counted else "no") for v, run in pairs]),
        Column("folder", "", [Cell(str(run.path), str(run.path)) for _, run in pairs], True),
    ]


def notes_of(table: Table, costs: Costs) -> list[str]:
    """What a reader has to know about single rows."""
    notes = []
    if table.default is None:
        notes.append("No run of the default is among these, so there are no differences to it.")
    for variant in table.variants:
        if not variant.counted:
            notes.append(f"{variant.name}: no validation yet.")
        elif not variant.finished:
            notes.append(f"{variant.name}: unfinished; numbers are those after {variant.step} steps.")
        for run in variant.runs:
            if variant.counted and run not in variant.counted:
                notes.append(f"{variant.name}: seed {run.seed} does not count, it has {run.progress}.")
        if costs.of(variant).note:
            notes.append(f"{variant.name}: not measured: {costs.of(variant).note}")
    return notes


def reading_guide(costs: Costs) -> list[str]:
    """How numbers came about, in sentences."""
    guide = [
        "Quality is that of the last validation, not of the best, which would favour noisy runs; with several seeds "
        "their mean ± one sample standard deviation (n - 1). A difference within that spread says nothing.",
        "Only finished runs count where a variant has some. Difference: the variant's mean minus the default's, after "
        "the same number of steps.",
    ]
    if costs.conditions:
        height, width = costs.conditions["size"]
        guide.append(
            f"GMACs are counted at {height} x {width} by the convention of the paper's tables: every layer's masks in "
            "full. Parameters: trainable ones."
        )
        if costs.conditions["latency"]:
            guide.append(
                f"Latency is that of the optimised network alone, without the post-processing that all variants share: "
                f"{height} x {width} pixels, batch 1, random weights, float32, all variants in turn in one process, "
                f"{costs.conditions['rounds']} rounds after {costs.conditions['warmup']} of warm-up, on "
                f"{costs.conditions['device']}, threads: {costs.conditions['threads']}, torch "
                f"{costs.conditions['torch']}."
            )
    return guide


def _statistic(statistic: Statistic | None) -> Cell:
    if statistic is None:
        return Cell(MISSING)
    spread = "" if statistic.std is None else f" ± {statistic.std:.1f}"
    return Cell(f"{statistic.mean:.1f}{spread}", statistic.mean)


def _number(value: float | None, digits: int) -> Cell:
    return Cell(MISSING) if value is None else Cell(f"{value:.{digits}f}", value)


def _latency(variant: Variant, costs: Costs) -> Cell:
    spread = costs.of(variant).latency_ms
    if spread is None:
        return Cell(MISSING)
    digits = 0 if spread.median >= 100 else 1
    low, median, high = (f"{value:.{digits}f}" for value in (spread.low, spread.median, spread.high))
    return Cell(f"{median} ({low}–{high})", spread.median)


def _signed(value: float) -> str:
    """With a real minus sign; no sign before a zero."""
    text = f"{value:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def _shortest(variant: Variant) -> int:
    return min((run.step for run in variant.counted or variant.runs), default=0)


def rows_of(columns: Sequence[Column]) -> list[tuple[Cell, ...]]:
    """Columns as rows."""
    return list(zip(*(column.cells for column in columns), strict=True))
