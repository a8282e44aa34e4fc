"""How figures look, and how one drawing becomes a PNG and an SVG that follows the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


class Style(NamedTuple):
    """Colours.

    Attributes:
        ink: of the default variant and of text.
        muted: of axes and guides.
        paper: behind text.
        series: for variants, told apart with any kind of colour vision (after Okabe and Ito).
        ramp: from few to many decoder layers.
    """

    ink: str
    muted: str
    paper: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Style(
    ink="#1b1f24",
    muted="#667079",
    paper="#ffffff",
    series=("#0072b2", "#c44e00", "#008a64", "#a8448f", "#a87400", "#3b3f8f"),
    ramp=("#86b6d9", "#6aa5cf", "#4f93c4", "#3781b6", "#236ea5", "#155b90", "#0d4a79", "#083a61", "#052b4a"),
)
DARK = Style(
    ink="#e8eaed",
    muted="#9aa4ad",
    paper="#14171a",
    series=("#5bb5ee", "#ff9352", "#35cf9f", "#eb9ad4", "#f0c04a", "#a9aef5"),
    ramp=("#2f668f", "#3a78a5", "#478abb", "#579ccd", "#6aaddc", "#80bde7", "#98ccf0", "#b3dbf7", "#d0eafd"),
)

Draw = Callable[[Style, float], Figure]
"""(colours, width in inches) -> drawing"""

MARKERS = "osD^vP"


@dataclass(frozen=True)
class Picture:
    """A figure of one table.

    Attributes:
        name: of its file.
        caption: what it shows and how to read it.
        draw: makes it at any width.
        wide: whether it deserves a page's full width.
    """

    name: str
    caption: str
    draw: Draw
    wide: bool = False


def to_png(draw: Draw, width: float) -> bytes:
    """Draw on white."""
    with matplotlib.rc_context(_SETTINGS):
        draw(LIGHT, width).savefig(picture := io.BytesIO(), format="png", dpi=144, facecolor=LIGHT.paper)
    return picture.getvalue()


def to_svg(draw: Draw, width: float, name: str, description: str) -> str:
    """Draw for a page that has the variables of `css_variables` and `--font`.

    Args:
        draw: what.
        width: in inches; the page scales it.
        name: unique on the page: ids begin with it.
        description: for those who do not see it, escaped for an attribute.

    Returns:
        An <svg> element without any reference to the outside.
    """
    with matplotlib.rc_context({**_SETTINGS, "svg.fonttype": "none", "svg.hashsalt": name}):
        draw(_stand_ins(), width).savefig(picture := io.StringIO(), format="svg", transparent=True)
    svg = picture.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{description}">'
    body = svg[svg.index(">") + 1 :].replace("xlink:href=", "href=")
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{name}-", body)
    body = re.sub(r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)", body)
    for variable, color in _variables(_stand_ins()).items():
        body = body.replace(color, f"var({variable})")
    return head + body.strip()


def css_variables(style: Style) -> str:
    """Declarations of a theme's colours."""
    return " ".join(f"{name}: {color};" for name, color in _variables(style).items())


def tidy(axes: Axes, style: Style) -> None:
    """Axes without a box: two lines, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(style.muted)
    axes.tick_params(colors=style.muted, labelcolor=style.ink)
    axes.xaxis.label.set_color(style.ink)
    axes.yaxis.label.set_color(style.ink)
    axes.grid(color=style.muted, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)


_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a variant's name is no formula
}


def _variables(style: Style) -> dict[str, str]:
    series = {f"--series-{i}": color for i, color in enumerate(style.series)}
    ramp = {f"--ramp-{i}": color for i, color in enumerate(style.ramp)}
    return {"--ink": style.ink, "--muted": style.muted, "--paper": style.paper, **series, **ramp}


def _stand_ins() -> Style:
    """Colours that occur nowhere else, to be replaced by the page's variables."""

    def some(start: int, count: int) -> tuple[str, ...]:
        return tuple(f"#fe{start + i:02x}ef" for i in range(count))

    return Style("#fe01ef", "#fe02ef", "#fe03ef", some(0x10, len(LIGHT.series)), some(0x40, len(LIGHT.ramp)))
