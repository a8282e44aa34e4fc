"""What the reports of all benchmarks are made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def format_head(title: str, result: Mapping[str, Any], facts: str) -> str:
    """Title, circumstances and command line.

    Args:
        title: of the report.
        result: of a benchmark.
        facts: what else there is to know, without a full stop.
    """
    environment, settings = result["environment"], result["settings"]
    load = environment.get("load_average_before")
    busy = "" if load is None else f", load before the start {load:.2f}"
    height, width = settings["size"]
    circumstances = (
        f"{height} x {width} pixels, batch {settings['batch']}, on {environment['device']}, torch "
        f"{environment['torch']}; threads: {environment['threads']} on {environment['cores']} cores{busy}; rounds: "
        f"{settings['rounds']} after {settings['warmup']} of warm-up; {facts}."
    )
    return f"# {title}\n\n{circumstances}\n\n```\n{environment['command']}\n```"


def format_memory(rows: Sequence[Row], device: str, what: str = "weights, activations and results") -> str:
    """The section about peak memory: what every contestant needed alone."""
    cells = []
    for row in rows:
        memory = row.get("memory", {"failed": "not measured"})
        if "failed" in memory:
            cells.append((row["name"], memory["failed"], "", ""))
        else:
            cells.append((row["name"], *(f"{memory[key]:.0f}" for key in ("increase", "base", "peak"))))
    text = (
        f"## Peak memory, MiB\n\nEach contestant once, alone in a fresh process on {device}. On a CPU *base* is the "
        f"resident set after the imports, on a GPU it is 0; the increase holds {what}.\n\n"
    )
    return text + format_table(("contestant", "increase", "base", "peak"), cells)


def format_skipped(skipped: Mapping[str, str]) -> str:
    """The section about contestants that did not work."""
    return "## Skipped\n\n" + "\n".join(f"- {name}: {reason}" for name, reason in skipped.items())


def format_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, all columns but the first aligned at the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|--:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def format_number(value: float) -> str:
    """With two to four digits."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def format_range(spread: Mapping[str, float], low: str, high: str) -> str:
    """From one value of a spread to another."""
    return f"{format_number(spread[low])} to {format_number(spread[high])}"


def format_median(spreads: Mapping[str, Mapping[str, float]], name: str) -> str:
    """Of a spread by name; empty if there is none."""
    return format_number(spreads[name]["median"]) if name in spreads else ""
