"""The report's figures: quality against cost, and against decoder layers; `curves` has those over training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from pem_lightning.ablation.curves import PANELS, curves_of, panel_of
from pem_lightning.ablation.labels import Label, place_labels
from pem_lightning.ablation.measure import Costs, Measurement
from pem_lightning.ablation.style import MARKERS, Picture, Style, tidy
from pem_lightning.ablation.table import Statistic, Table, Variant

WIDE, NARROW, HALF = 10.0, 3.7, 4.4
"""Widths in inches: of a desktop's page, of a phone's, and of half a desktop's."""

LOGARITHMIC_FROM = 4.0
"""Quotient of the largest and the smallest cost from which on a linear axis would crowd most of them."""

Point = tuple[Variant, Statistic, Measurement]
"""A variant with its quality and its cost."""


def pictures_of(table: Table, costs: Costs) -> list[Picture]:
    """All figures that a table's runs give something for."""
    pictures = [_quality(table, costs), _depth(table, costs)]
    pictures += [curves_of(table, panel) for panel in PANELS]
    return [picture for picture in pictures if picture is not None]


def _quality(table: Table, costs: Costs) -> Picture | None:
    metric = table.example.metric
    timed = any(costs.of(variant).latency_ms for variant in table.variants)
    points = [
        (variant, statistic, costs.of(variant))
        for variant in table.variants
        if (statistic := variant.statistic(metric))
        and (costs.of(variant).latency_ms if timed else costs.of(variant).gmacs)
    ]
    if len(points) < 2:
        return None
    cost = "latency in ms: median, and whiskers to the quartiles" if timed else "GMACs per image"
    caption = (
        f"{metric} against {cost}. Higher is better, further left is cheaper. "
        f"{_spread_note(point[1] for point in points)}Dotted lines pass through the default. "
        "Names for which there is no room are left out."
    )
    x_label = "latency of the network, ms" if timed else "GMACs"
    return Picture("quality", caption, lambda style, width: _draw_quality(points, metric, x_label, style, width), True)


def _draw_quality(points: Sequence[Point], metric: str, x_label: str, style: Style, width: float) -> Figure:
    wide = width > HALF
    figure = Figure(figsize=(width, 5.0), layout="constrained")
    axes = figure.subplots()
    first = sorted(points, key=lambda point: not point[0].is_default)
    marks = [_mark(axes, point, style) for point in first]
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"{metric}, percent")
    costs = [label.x for label, _ in marks]
    if max(costs) > LOGARITHMIC_FROM * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if max(costs) > 5 * min(costs) else (1, 1.5, 2, 3, 5, 7))
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.margins(x=0.12 if wide else 0.2, y=0.12)
    tidy(axes, style)
    present = {panel_of(variant) for variant, _, _ in points if not variant.is_default}
    if len(present) > 1:
        handles = [
            Line2D([], [], color=style.series[place], marker=MARKERS[place], linestyle="", label=name)
            for place, name in enumerate(PANELS)
            if name in present
        ]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=4 if wide else 2,
            frameon=False,
            labelcolor=style.ink,
            fontsize=8.5,
        )
    figure.draw_without_rendering()
    place_labels(axes, [label for label, _ in marks], [line for _, lines in marks for line in lines])
    return figure


def _mark(axes: Axes, point: Point, style: Style) -> tuple[Label, list[Bbox]]:
    """Draw a variant; returns its label and where its error bars are."""
    variant, statistic, cost = point
    place = list(PANELS).index(panel_of(variant))
    color = style.ink if variant.is_default else style.series[place]
    y, std, spread = statistic.mean, statistic.std or 0.0, cost.latency_ms
    x = spread.median if spread else cost.gmacs or 0.0
    low, high = (spread.low, spread.high) if spread else (x, x)
    axes.errorbar(
        x,
        y,
        xerr=[[x - low], [high - x]],
        yerr=std,
        color=color,
        elinewidth=0.8,
        marker="*" if variant.is_default else MARKERS[place],
        markersize=11 if variant.is_default else 6,
    )
    if variant.is_default:
        axes.axhline(y, color=style.muted, linewidth=0.7, linestyle=":", zorder=0)
        axes.axvline(x, color=style.muted, linewidth=0.7, linestyle=":", zorder=0)
    bars = [Bbox([[low, y], [high, y]]), Bbox([[x, y - std], [x, y + std]])]
    return Label(x, y, variant.name, color, variant.is_default), bars


def _depth(table: Table, costs: Costs) -> Picture | None:
    """Only variants that change nothing but the number of layers."""
    metric = table.example.metric
    points = [
        (variant, statistic, costs.of(variant))
        for variant in sorted(table.variants, key=lambda variant: variant.num_layers)
        if {term.family for term in variant.terms} <= {"depth"} and (statistic := variant.statistic(metric))
    ]
    if len(points) < 2:
        return None
    timed = any(cost.latency_ms for _, _, cost in points)
    caption = f"{metric}{' and latency' if timed else ''} against the number of decoder layers. "
    caption += _spread_note(statistic for _, statistic, _ in points)
    caption += "Whiskers of the latency span its quartiles. " if timed else ""
    caption += "The dotted line marks the default." if any(variant.is_default for variant, _, _ in points) else ""
    return Picture("depth", caption.strip(), lambda style, width: _draw_depth(points, metric, timed, style, width))


def _draw_depth(points: Sequence[Point], metric: str, timed: bool, style: Style, width: float) -> Figure:
    figure = Figure(figsize=(width, 4.4 if timed else 2.8), layout="constrained")
    upper, *lower = figure.subplots(2 if timed else 1, 1, sharex=True, squeeze=False)[:, 0]
    line = {"markersize": 5, "capsize": 3, "elinewidth": 1}
    upper.errorbar(
        [variant.num_layers for variant, _, _ in points],
        [statistic.mean for _, statistic, _ in points],
        yerr=[statistic.std or 0.0 for _, statistic, _ in points],
        color=style.series[0],
        marker="o",
        **line,
    )
    upper.set_ylabel(f"{metric}, percent")
    for axes in lower:
        spreads = [(variant.num_layers, cost.latency_ms) for variant, _, cost in points if cost.latency_ms]
        axes.errorbar(
            [layers for layers, _ in spreads],
            [spread.median for _, spread in spreads],
            yerr=[[s.median - s.low for _, s in spreads], [s.high - s.median for _, s in spreads]],
            color=style.series[1],
            marker="s",
            **line,
        )
        axes.set_ylabel("latency, ms")
        axes.set_ylim(bottom=0)
    for axes in (upper, *lower):
        for variant, _, _ in points:
            if variant.is_default:
                axes.axvline(variant.num_layers, color=style.muted, linewidth=0.7, linestyle=":", zorder=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        tidy(axes, style)
    (lower[-1] if lower else upper).set_xlabel("decoder layers")
    return figure


def _spread_note(statistics: Iterable[Statistic]) -> str:
    repeated = any(statistic.std is not None for statistic in statistics)
    return "Error bars: one standard deviation over the seeds. " if repeated else "One seed each. "
