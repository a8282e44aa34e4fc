"""The result of a benchmark of training in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pem_lightning.benchmark.markdown import (
    Row,
    format_head,
    format_median,
    format_memory,
    format_number,
    format_range,
    format_skipped,
    format_table,
)


def to_markdown(result: Mapping[str, Any]) -> str:
    """Write tables of what `job.run_training_benchmark` returned; what was not measured has no section."""
    settings, rows, device = result["settings"], result["steps"], result["environment"]["device"]
    facts = f"{settings['segments']} segments per image, {settings['num_points']} points; weights: random"
    parts = [format_head("Benchmark of training", result, facts)]
    if result["equality"]:
        parts.append(_equality(result["equality"]))
    parts += [_steps(rows), _stages(rows)]
    if any("memory" in row for row in rows):
        parts.append(format_memory(rows, device, "weights, the optimiser's state, gradients and activations"))
    if result["skipped"]:
        parts.append(format_skipped(result["skipped"]))
    return "\n\n".join(parts) + "\n"


def _equality(rows: Sequence[Row]) -> str:
    cells = [
        (
            row["name"],
            f"{row['loss']:.4f}",
            f"{row['loss_difference']:.1e}",
            f"{row['largest_difference']:.1e}",
            f"{row['gradient_norm']:.2f}",
            f"{row['gradient_norm_difference']:.1e}",
            f"{row['gradient_difference']:.1e}",
        )
        for row in rows
    ]
    text = (
        "## Equality\n\nOf the same weights, images, targets and random points, before anything is timed. Differences "
        "from the straightforward path in float32 are relative: of the sum of all losses, of the loss that differs "
        "most, of the norm of all gradients, and the norm of the gradients' difference. Normalisation takes running "
        "statistics here; compiled networks are left out. The row with another library behind the same convolutions "
        "says how much is rounding.\n\n"
    )
    columns = ("path", "loss", "differs", "largest of a loss", "gradient norm", "differs", "gradients differ")
    return text + format_table(columns, cells)


def _steps(rows: Sequence[Row]) -> str:
    """The main table."""
    with_gpu = any(row["host_synchronisations"] is not None for row in rows)
    cells = []
    for row in rows:
        ratio = row["ratio"]
        cells.append(
            (
                row["name"],
                format_number(row["step_ms"]["median"]),
                format_range(row["step_ms"], "low", "high"),
                format_range(row["step_ms"], "min", "max"),
                f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "",
                f"{row['images_per_s']:.2f}",
                row["optimizer"],
                *([str(row["host_synchronisations"])] if with_gpu else []),
            )
        )
    text = (
        "## Step\n\nFrom uint8 images and boolean masks to updated weights, medians over the rounds. *Ratio* to the "
        "straightforward step of the same backbone in the same precision, the median (and quartiles) of the quotients "
        "within each round.\n\n"
    )
    columns = ("contestant", "ms", "quartiles", "min to max", "ratio", "images/s", "optimiser")
    return text + format_table((*columns, *(["host synchronisations"] if with_gpu else [])), cells)


def _stages(rows: Sequence[Row]) -> str:
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages_ms"]))
    cells = [(row["name"], *(_stage(row, stage) for stage in stages)) for row in rows]
    return "## Stages, ms (ratio)\n\n" + format_table(("contestant", *stages), cells)


def _stage(row: Row, stage: str) -> str:
    ratios = row["stage_ratios"] if row["kind"] != "straightforward" else {}
    return format_median(row["stages_ms"], stage) + (f" ({ratios[stage]['median']:.2f})" if stage in ratios else "")
