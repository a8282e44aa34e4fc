"""Learning curves of variants, several to a panel, each next to the default's."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pem_lightning.ablation.style import MARKERS, Picture, Style, tidy
from pem_lightning.ablation.table import DEFAULT, Statistic, Table, Variant

PANELS = {
    "attention": ("attention",),
    "pixel decoder": ("pixel decoder",),
    "depth": ("depth",),
    "others": ("supervision", "queries", "backbone", "other"),
}
"""Panel of learning curves -> families of variants; combinations are among the others."""
MAX_CURVES = 12
"""More lines in one panel cannot be told apart."""


def panel_of(variant: Variant) -> str:
    """In which panel a variant that changes something has its learning curve."""
    families = {term.family for term in variant.terms}
    return next((name for name, members in PANELS.items() if families <= set(members)), "others")


def curves_of(table: Table, panel: str) -> Picture | None:
    """The learning curves of one of `PANELS`; None if no variant belongs there."""
    metric = table.example.metric
    default = [v for v in table.variants if v.is_default and v.step is not None]
    own = [v for v in table.variants if not v.is_default and panel_of(v) == panel and v.step is not None]
    alone = panel == "others" and not any(v.step is not None and not v.is_default for v in table.variants)
    if not own and not (default and alone):
        return None
    shown = own
    if len(own) > MAX_CURVES:
        best = sorted(own, key=lambda v: -(s.mean if (s := v.statistic(metric)) else 0.0))[:MAX_CURVES]
        shown = [variant for variant in own if variant in best]
    which = f"the best {MAX_CURVES} of {len(own)}" if len(own) > MAX_CURVES else panel
    seeds = any(len(v.counted) > 1 for v in (*default, *shown))
    caption = f"{metric} over training: {which if own else DEFAULT}"
    caption += ", mean over the seeds; bands: one standard deviation." if seeds else "."
    return Picture(
        f"curves_{panel.replace(' ', '_')}" if own else "curves",
        caption,
        lambda style, width: _draw_curves(default, shown, metric, panel == "depth", style, width),
    )


def _draw_curves(
    default: Sequence[Variant], own: Sequence[Variant], metric: str, by_depth: bool, style: Style, width: float
) -> Figure:
    rows = -(-(len(default) + len(own)) // 2)
    figure = Figure(figsize=(width, 2.9 + 0.17 * rows), layout="constrained")
    axes = figure.subplots()
    for place, variant in enumerate(own):
        color = style.series[place % len(style.series)]
        if by_depth:
            color = style.ramp[min(variant.num_layers, len(style.ramp)) - 1]
        dashes = "-" if by_depth or place < len(style.series) else "--"
        _curve(axes, variant, metric, color, MARKERS[place % len(MARKERS)], dashes)
    for variant in default:
        name = f"{variant.name} ({variant.num_layers} layers)" if by_depth else variant.name
        _curve(axes, variant, metric, style.ink, "*", "-", name)
    axes.set_xlabel("steps")
    axes.set_ylabel(f"{metric}, percent")
    axes.margins(x=0.03)
    axes.set_ylim(bottom=_bottom([*default, *own], metric))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    tidy(axes, style)
    figure.legend(
        loc="outside lower center", ncols=2, frameon=False, labelcolor=style.ink, fontsize=8.5, handlelength=2.2
    )
    return figure


def _bottom(variants: Sequence[Variant], metric: str) -> float:
    """Where the axis begins: the steep start would hide how variants differ in the end."""
    end = max(variant.step or 0 for variant in variants)
    values = [
        value
        for variant in variants
        for run in variant.counted
        for step, value in run.validations(metric).items()
        if step >= end / 4
    ]
    return min(values) - 0.05 * (max(values) - min(values))


def _curve(axes: Axes, variant: Variant, metric: str, color: str, marker: str, line: str, name: str = "") -> None:
    """Mean and band at the steps that all counted seeds share."""
    series = [run.validations(metric) for run in variant.counted]
    steps = sorted(set.intersection(*map(set, series)))
    statistics = [Statistic.of([values[step] for values in series]) for step in steps]
    means = [s.mean for s in statistics]
    size = 7 if marker == "*" else 3.5
    axes.plot(
        steps,
        means,
        color=color,
        marker=marker,
        markersize=size,
        linestyle=line,
        linewidth=1.6,
        label=name or variant.name,
    )
    if len(series) > 1:
        low = [s.mean - (s.std or 0) for s in statistics]
        high = [s.mean + (s.std or 0) for s in statistics]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
