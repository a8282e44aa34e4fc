"""The report as one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from pem_lightning.ablation.cells import Column, columns_of, notes_of, reading_guide, rows_of, run_columns
from pem_lightning.ablation.figures import HALF, NARROW, WIDE, pictures_of
from pem_lightning.ablation.measure import Costs
from pem_lightning.ablation.style import DARK, LIGHT, Picture, css_variables, to_svg
from pem_lightning.ablation.table import Table

_ASSETS = Path(__file__).parent


def to_html(tables: Sequence[Table], costs: Costs, head: str) -> str:
    """Write the page.

    Args:
        tables: of `tabulate`.
        costs: of `measure_variants`.
        head: what it is about and how it was made, in one line.
    """
    sections = [_section(table, costs, number) for number, table in enumerate(tables)]
    guide = "".join(f"<li>{escape(line)}</li>" for line in reading_guide(costs))
    styles = (_ASSETS / "report.css").read_text()
    themes = f":root {{ {css_variables(LIGHT)} }}\n"
    themes += f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(DARK)} }} }}\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:">
<title>PEM ablations</title>
<style>
{themes}{styles}</style>
</head>
<body>
<header>
<h1>PEM ablations</h1>
<p>{escape(head)}</p>
</header>
<main>
{"".join(sections)}<section>
<h2>How to read this</h2>
<ul>{guide}</ul>
</section>
</main>
<script>
{(_ASSETS / "report.js").read_text()}</script>
</body>
</html>
"""


def _section(table: Table, costs: Costs, number: int) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(table, costs))
    figures = "".join(_figure(picture, f"t{number}-{picture.name}") for picture in pictures_of(table, costs))
    return f"""<section aria-labelledby="t{number}">
<h2 id="t{number}">{escape(table.title)}</h2>
<p>{escape(table.scale)}</p>
{_table(columns_of(table, costs), "Variants", [v.is_default for v in table.variants])}
{f'<ul class="notes">{notes}</ul>' if notes else ""}
<div class="figures">
{figures}</div>
<details>
<summary>All {len(table.runs)} runs</summary>
{_table(run_columns(table), "Runs")}
</details>
</section>
"""


def _table(columns: Sequence[Column], caption: str, marked: Sequence[bool] = ()) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none" data-first="{"ascending" if c.less_is_better else "descending"}">'
        f'<button type="button">{escape(c.head)}</button>'
        f"<small>{escape(c.meaning)}</small></th>"
        for c in columns
    )
    rows = []
    for place, (first, *cells) in enumerate(rows_of(columns)):
        mark = ' class="default"' if place < len(marked) and marked[place] else ""
        values = "".join(f"<td{_value(cell.value)}>{escape(cell.text)}</td>" for cell in cells)
        rows.append(f'<tr{mark}><th scope="row"{_value(first.value)}>{escape(first.text)}</th>{values}</tr>\n')
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}, table">\n'
        f"<table><caption>{escape(caption)}, click a column's title to sort by it</caption>\n"
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>"
    )


def _value(value: int | float | str | None) -> str:
    if value is None:
        return ""
    return f' data-value="{escape(value) if isinstance(value, str) else f"{value:.6g}"}"'


def _figure(picture: Picture, name: str) -> str:
    description = escape(picture.caption)
    if picture.wide:
        drawings = "".join(
            f'<div class="{kind}">{to_svg(picture.draw, width, f"{name}-{kind}", description)}</div>'
            for kind, width in (("wide", WIDE), ("narrow", NARROW))
        )
    else:
        drawings = to_svg(picture.draw, HALF, name, description)
    kind = ' class="full"' if picture.wide else ""
    return f"<figure{kind}>{drawings}<figcaption>{description}</figcaption></figure>\n"
