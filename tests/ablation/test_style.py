import re
import xml.etree.ElementTree as ET

from matplotlib.figure import Figure

from pem_lightning.ablation.style import DARK, LIGHT, css_variables, tidy, to_png, to_svg


def draw(style, width):
    figure = Figure(figsize=(width, 2))
    axes = figure.subplots()
    axes.errorbar([1, 2], [1, 2], yerr=[0.1, 0.2], color=style.series[0], marker="o", label="<b> & $x$ $y$")
    axes.fill_between([1, 2], [1, 2], [2, 3], color=style.ramp[8], alpha=0.2)
    axes.legend(labelcolor=style.ink)
    tidy(axes, style)
    return figure


def test_an_svg_follows_the_pages_theme_and_needs_nothing_else():
    svg = to_svg(draw, 4.0, "one", "what it &quot;shows&quot;")
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'what it "shows"'
    assert {"--ink", "--muted", "--series-0", "--ramp-8"} <= set(re.findall(r"var\((--[\w-]+)\)", svg))
    assert "#fe" not in svg
    assert "http" not in svg
    assert "<b> & $x$ $y$" in "".join(root.itertext())
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(i.startswith("one-") for i in ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= set(ids)


def test_drawings_are_the_same_every_time():
    assert to_svg(draw, 4.0, "one", "") == to_svg(draw, 4.0, "one", "")
    assert to_png(draw, 4.0).startswith(b"\x89PNG")


def test_themes_declare_the_same_variables():
    names = [re.findall(r"(--[\w-]+):", css_variables(style)) for style in (LIGHT, DARK)]
    assert names[0] == names[1]


def contrast(one, other):
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_can_be_read_in_both_themes():
    """The contrast that WCAG AA asks for: names next to points are text, too."""
    for style in (LIGHT, DARK):
        for color in (style.ink, style.muted, *style.series):
            assert contrast(color, style.paper) >= 4.0, color
