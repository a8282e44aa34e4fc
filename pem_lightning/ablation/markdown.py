"""The report in GitHub's Markdown, with its figures as files next to it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pem_lightning.ablation.cells import Column, columns_of, notes_of, reading_guide, rows_of
from pem_lightning.ablation.measure import Costs
from pem_lightning.ablation.style import Picture
from pem_lightning.ablation.table import Table


def to_markdown(tables: Sequence[Table], costs: Costs, head: str, files: Sequence[Mapping[str, Picture]]) -> str:
    """Write the text.

    Args:
        tables: of `tabulate`.
        costs: of `measure_variants`.
        head: what it is about and how it was made, in one line.
        files: for every table, file name -> figure.
    """
    parts = ["# PEM ablations", escape(head)]
    for table, pictures in zip(tables, files, strict=True):
        parts += [f"## {escape(table.title)}", escape(table.scale), _table(columns_of(table, costs))]
        if notes := notes_of(table, costs):
            parts.append("\n".join(f"- {escape(note)}" for note in notes))
        parts += [f"![{escape(p.caption)}]({file})\n\n*{escape(p.caption)}*" for file, p in pictures.items()]
    parts += ["## How to read this", "\n".join(f"- {escape(line)}" for line in reading_guide(costs))]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Make text mean itself: names come from command lines."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(text.split()))


def _table(columns: Sequence[Column]) -> str:
    heads = " | ".join(f"{c.head}, {_unit(c)}" if _unit(c) else c.head for c in columns)
    lines = [f"| {heads} |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(escape(c.text) for c in row) + " |" for row in rows_of(columns))])


def _unit(column: Column) -> str:
    return {"parameters": "M", "latency": "ms (quartiles)"}.get(column.head, "")
