"""The benchmark's result in Markdown."""

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
    """Write tables of what `job.run_benchmark` returned; what was not measured has no section."""
    weights = sorted({row["weights"] for row in result["contestants"]})
    parts = [format_head("Benchmark", result, f"weights: {', '.join(weights)}")]
    parts += [_latency(result["contestants"]), _stages(result["contestants"])]
    parts += [_roofline(result["contestants"], result["ceilings"])]
    if any("memory" in row for row in result["contestants"]):
        parts.append(format_memory(result["contestants"], result["environment"]["device"]))
    if result.get("equality"):
        parts.append(_equality(result["equality"]))
    parts += [_kernels(section) for section in result.get("kernels", ())]
    if result["skipped"]:
        parts.append(format_skipped(result["skipped"]))
    return "\n\n".join(parts) + "\n"


def _latency(rows: Sequence[Row]) -> str:
    """The main table."""
    columns = ("contestant", "ms", "quartiles", "min to max", "times as fast", "images/s", "semantic only, ms")
    cells = []
    for row in rows:
        speedup = row["speedup"]
        cells.append(
            (
                row["name"],
                format_number(row["latency_ms"]["median"]),
                format_range(row["latency_ms"], "low", "high"),
                format_range(row["latency_ms"], "min", "max"),
                f"{speedup['median']:.2f} ({speedup['min']:.2f} to {speedup['max']:.2f})" if speedup else "",
                f"{row['images_per_s']:.2f}",
                format_number(row["semantic_only_ms"]["median"]),
                f"{row['gmacs']:.1f}",
                f"{row['parameters_m']:.2f}",
                "" if row["kept_queries"] is None else str(row["kept_queries"]),
            )
        )
    notes = [f"- {row['name']}: {row['note']}." for row in rows if row["note"]]
    text = (
        "## Latency\n\nFrom the normalised image to the maps at its size: network, semantic and panoptic "
        "post-processing, medians over the rounds. *Times as fast* as the straightforward path of the same backbone, "
        "the median (and extremes) of the quotients within each round. *Queries kept* by panoptic post-processing: "
        "its work grows with them. With random weights thresholds are set so that a given number is kept.\n\n"
    )
    table = format_table((*columns, "GMACs", "M parameters", "queries kept"), cells)
    return text + table + ("\n\n" + "\n".join(notes) if notes else "")


def _stages(rows: Sequence[Row]) -> str:
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages_ms"]))
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks_ms"]))
    cells = [
        (
            row["name"],
            *(format_median(row["stages_ms"], stage) for stage in stages),
            *(format_median(row["tasks_ms"], task) for task in tasks),
        )
        for row in rows
    ]
    text = "## Stages, ms\n\nPost-processing makes all maps; to the right of it, each of them on its own.\n\n"
    return text + format_table(("contestant", *stages, *(f"{task} alone" for task in tasks)), cells)


def _roofline(rows: Sequence[Row], ceilings: Mapping[str, Any]) -> str:
    peaks = "; ".join(
        f"{name} {matmul / 1e9:.0f} GFLOP/s in a matrix product, {ceilings['conv'][name] / 1e9:.0f} in a convolution"
        for name, matmul in ceilings["matmul"].items()
    )
    text = (
        f"## Roofline of the network\n\nThe device's ceilings, measured: copying {ceilings['bandwidth'] / 1e9:.1f} "
        f"GB/s; {peaks}. Bytes are an estimate: what every function reads and writes, weights and activations, each "
        "tensor once, caches left aside. The least time follows from operations and bytes; a network that keeps its "
        "activations in caches can be faster than it.\n\n"
    )
    cells = [
        (
            row["name"],
            f"{2 * row['gmacs']:.1f}",
            f"{row['roofline']['gbytes']:.2f}",
            format_number(row["roofline"]["least_ms"]),
            row["roofline"]["bound_by"],
            format_number(row["network_ms"]["median"]),
            f"{row['roofline']['reached']:.0%}",
        )
        for row in rows
    ]
    return text + format_table(("contestant", "GFLOP/image", "GB", "least ms", "bound by", "ms", "reached"), cells)


def _equality(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        flips = row["prototype_flips"]
        cells.append(
            (
                row["name"],
                f"{row['semantic_pixels']} ({row['semantic_share']:.2e})",
                f"{row['panoptic_pixels']} ({row['panoptic_share']:.2e})",
                f"{row['class_logits']:.1e}",
                f"{row['mask_logits']:.1e} of {row['largest_mask_logit']:.1f}",
                "not seen" if flips is None else f"{flips} of {row['prototypes']}",
            )
        )
    text = (
        f"## Equality\n\nWhat differs from the straightforward path, of {rows[0]['pixels']} pixels; the row with "
        "another library behind the same convolutions says how much of it is rounding.\n\n"
    )
    columns = (
        "path",
        "semantic pixels",
        "panoptic pixels",
        "class logits",
        "mask logits",
        "other prototypes",
    )
    return text + format_table(columns, cells)


def _kernels(section: Mapping[str, Any]) -> str:
    """One deformable operator."""
    cells = [
        (
            row["kernel"],
            row["size"],
            format_number(row["forward_ms"]["median"]),
            format_range(row["forward_ms"], "min", "max"),
            format_number(row["forward_backward_ms"]["median"]),
            format_range(row["forward_backward_ms"], "min", "max"),
            f"{row['float64_difference']:.1e}",
        )
        for row in section["rows"]
    ]
    columns = ("kernel", "size", "forward, ms", "min to max", "with backward, ms", "min to max", "float64 deviation")
    text = (
        f"## {section['operator']}\n\n{section['note']}, batch {section['batch']}. *Deviation*: the largest of outputs "
        f"and gradients from {section['reference']}'s.\n\n"
    )
    missing = "".join(f"\n- skipped: {reason}" for reason in section["missing"].values())
    return text + format_table(columns, cells) + ("\n" + missing if missing else "")
