"""The benchmark's result as a picture: a bar per contestant, stacked by stage."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

# Stage -> colour, in the order of computation.
COLORS = {
    "network": "#8d99ae",
    "backbone": "#1f3a5f",
    "pixel decoder": "#1b7f79",
    "transformer decoder": "#edae49",
    "post-processing": "#d1495b",
}


def draw_latencies(result: Mapping[str, Any]) -> bytes:
    """Draw what `job.run_benchmark` returned.

    Bars are medians of the stages; the whisker spans the quartiles of the whole.

    Returns:
        A PNG.
    """
    rows = result["contestants"]
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(rows)), dpi=120, layout="constrained")
    axes = figure.subplots()
    longest = max(row["latency_ms"]["high"] for row in rows)
    for stage, color in COLORS.items():
        widths = [row["stages_ms"].get(stage, {"median": 0.0})["median"] for row in rows]
        starts = [_before(row["stages_ms"], stage) for row in rows]
        if any(widths):
            axes.barh(range(len(rows)), widths, left=starts, height=0.62, color=color, label=stage)
    for place, row in enumerate(rows):
        latency, speedup = row["latency_ms"], row["speedup"]
        axes.plot([latency["low"], latency["high"]], [place, place], color="black", linewidth=1.2, marker="|")
        text = f"{latency['median']:.3g} ms" if latency["median"] < 1000 else f"{latency['median']:.0f} ms"
        if speedup and row["kind"] != "straightforward":
            text += f"  ({speedup['median']:.2f}x)"
        axes.text(max(latency["high"], latency["median"]) + 0.012 * longest, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel("milliseconds, median; whiskers: quartiles; in brackets: times as fast as straightforward")
    height, width = result["settings"]["size"]
    environment = result["environment"]
    axes.set_title(
        f"{height} x {width}, batch {result['settings']['batch']}, {environment['device']}, "
        f"threads: {environment['threads']}",
        fontsize=10,
        loc="left",
    )
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(COLORS), frameon=False, fontsize=9)
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()


def _before(stages: Mapping[str, Mapping[str, float]], stage: str) -> float:
    """Where a stage begins: after all that come before it."""
    names = list(COLORS)
    return sum((stages[name]["median"] for name in names[: names.index(stage)] if name in stages), 0.0)


def _label(row: Mapping[str, Any]) -> str:
    return row["name"] + ("" if "panoptic" in row["tasks"] else " (semantic only)")
