"""Names next to points, none across another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox, BboxBase

RADII = (7.0, 12.0, 18.0, 25.0, 33.0, 42.0)
"""Tried distances between point and name, in typographic points."""
LEADER_FROM = 12.0
"""From this distance on a line joins them."""
DIRECTIONS = tuple(math.radians(a) for a in (0, 180, 90, 270, 45, 315, 135, 225, 22, 338, 158, 202, 67, 113, 247, 293))


class Label(NamedTuple):
    """A point's name.

    Attributes:
        x: of the point, in the axes' data.
        y: of the point, in the axes' data.
        text: its name.
        color: of the name.
        bold: to stand out.
    """

    x: float
    y: float
    text: str
    color: str
    bold: bool = False


def place_labels(
    axes: Axes, labels: Sequence[Label], lines: Sequence[Bbox] = (), *, fontsize: float = 8.5, marker: float = 4.0
) -> list[str]:
    """Write each name as near to its point as there is room; call it when limits are final.

    Args:
        axes: of a figure whose layout is final.
        labels: the first are placed first, and best.
        lines: such as error bars, in the axes' data, which names keep off, too.
        fontsize: in points.
        marker: half the size of a point's mark, in points.

    Returns:
        Names for which there was no room, and which are left out.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    renderer = FigureCanvasAgg(figure).get_renderer()
    unit = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    centres = [axes.transData.transform((label.x, label.y)) for label in labels]
    taken = [_box(x, y, marker * unit, marker * unit) for x, y in centres]
    taken += [axes.transData.transform_bbox(line).padded(unit) for line in lines]
    left_out = []
    for label, (x, y) in zip(labels, centres, strict=True):
        weight = "bold" if label.bold else "normal"
        sample = axes.text(label.x, label.y, label.text, fontsize=fontsize, weight=weight)
        extent = sample.get_window_extent(renderer)
        sample.remove()
        place = _free_place(x, y, extent.width, extent.height, inside, taken, unit)
        if place is None:
            left_out.append(label.text)
            continue
        box, radius = place
        taken.append(box)
        axes.annotate(
            label.text,
            (label.x, label.y),
            ((box.x0 + box.x1) / 2 / unit - x / unit, (box.y0 + box.y1) / 2 / unit - y / unit),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=fontsize,
            color=label.color,
            weight=weight,
            arrowprops={"arrowstyle": "-", "color": label.color, "alpha": 0.5, "linewidth": 0.7, "shrinkB": marker}
            if radius >= LEADER_FROM
            else None,
        )
    return left_out


def _free_place(
    x: float, y: float, width: float, height: float, inside: BboxBase, taken: Sequence[Bbox], unit: float
) -> tuple[Bbox, float] | None:
    """The nearest box around a point that lies within the axes and across nothing; with its distance in points."""
    for radius in RADII:
        for angle in DIRECTIONS:
            cos, sin = math.cos(angle), math.sin(angle)
            # The box's edge, not its centre, is at the distance.
            centre_x = x + cos * radius * unit + math.copysign(width / 2, cos) * (abs(cos) > 0.3)
            centre_y = y + sin * radius * unit + math.copysign(height / 2, sin) * (abs(sin) > 0.3)
            box = _box(centre_x, centre_y, width / 2 + unit, height / 2 + unit)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not box.count_overlaps(taken):
                return box, radius
    return None


def _box(x: float, y: float, half_width: float, half_height: float) -> Bbox:
    return Bbox([[x - half_width, y - half_height], [x + half_width, y + half_height]])
