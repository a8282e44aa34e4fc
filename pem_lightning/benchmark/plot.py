"""A benchmark's result as a picture: a bar per contestant, stacked by stage."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

# Stage -> colour, in the order of computation.
COLORS = {
    "network": "#8d99ae",
    "backbone": "#1f3a5f",
    "pixel decoder": "#1b7f79",
    "transformer decoder": "#edae49",
    "post-processing": "#d1495b",
}


TRAINING_COLORS = {
    "data preparation": "#8d99ae",
    "forward": "#1f3a5f",
    "matching and losses": "#1b7f79",
    "backward": "#edae49",
    "clipping and optimiser": "#d1495b",
}


class Bar(NamedTuple):
    """A contestant.

    Attributes:
        label: to the left of it.
        whole: its time in ms: median, quartiles.
        stages: likewise.
        note: behind its time.
    """

    label: str
    whole: Mapping[str, float]
    stages: Mapping[str, Mapping[str, float]]
    note: str = ""


def draw_latencies(result: Mapping[str, Any]) -> bytes:
    """Draw what `job.run_benchmark` returned.

    Bars are medians of the stages; the whisker spans the quartiles of the whole.

    Returns:
        A PNG.
    """
    bars = []
    for row in result["contestants"]:
        label = row["name"] + ("" if "panoptic" in row["tasks"] else " (semantic only)")
        faster = row["speedup"] and row["kind"] != "straightforward"
        note = f"({row['speedup']['median']:.2f}x)" if faster else ""
        bars.append(Bar(label, row["latency_ms"], row["stages_ms"], note))
    return _draw(bars, COLORS, "in brackets: times as fast as straightforward", _title(result))


def draw_steps(result: Mapping[str, Any]) -> bytes:
    """Draw what `training.job.run_training_benchmark` returned; see `draw_latencies`."""
    bars = []
    for row in result["steps"]:
        ours = row["ratio"] and row["kind"] != "straightforward"
        note = f"({row['ratio']['median']:.2f})" if ours else ""
        bars.append(Bar(row["name"], row["step_ms"], row["stages_ms"], note))
    return _draw(bars, TRAINING_COLORS, "in brackets: share of the straightforward step", "Training, " + _title(result))


def _draw(bars: Sequence[Bar], colors: Mapping[str, str], brackets: str, title: str) -> bytes:
    figure = Figure(figsize=(10, 1.6 + 0.45 * len(bars)), dpi=120, layout="constrained")
    axes = figure.subplots()
    longest = max(bar.whole["high"] for bar in bars)
    starts = [0.0] * len(bars)
    for stage, color in colors.items():
        widths = [bar.stages.get(stage, {"median": 0.0})["median"] for bar in bars]
        if any(widths):
            axes.barh(range(len(bars)), widths, left=starts, height=0.62, color=color, label=stage)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for place, bar in enumerate(bars):
        axes.plot([bar.whole["low"], bar.whole["high"]], [place, place], color="black", linewidth=1.2, marker="|")
        median = bar.whole["median"]
        text = (f"{median:.3g} ms" if median < 1000 else f"{median:.0f} ms") + (f"  {bar.note}" if bar.note else "")
        axes.text(max(bar.whole["high"], median) + 0.012 * longest, place, text, va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest)
    axes.set_xlabel(f"milliseconds, median; whiskers: quartiles; {brackets}")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(colors), frameon=False, fontsize=9)
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()


def _title(result: Mapping[str, Any]) -> str:
    height, width = result["settings"]["size"]
    environment, batch = result["environment"], result["settings"]["batch"]
    return f"{height} x {width}, batch {batch}, {environment['device']}, threads: {environment['threads']}"
