"""The report: a table and figures per group of comparable runs, as Markdown, csv and one HTML file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from pem_lightning.ablation.figures import HALF, WIDE, pictures_of
from pem_lightning.ablation.html import to_html
from pem_lightning.ablation.markdown import to_markdown
from pem_lightning.ablation.measure import Costs
from pem_lightning.ablation.rows import COLUMNS, variant_rows
from pem_lightning.ablation.style import to_png
from pem_lightning.ablation.table import Table
from pem_lightning.files import write_file


def write_report(tables: Sequence[Table], costs: Costs, output: Path, head: str) -> list[Path]:
    """Write `report.html`, `report.md`, `report.csv` and the figures as PNG.

    Args:
        tables: of `tabulate`.
        costs: of `measure_variants`; `Costs()` for none.
        output: folder.
        head: what it is about and how it was made, in one line.

    Returns:
        What was written.

    Raises:
        UserError: a file cannot be written.
    """
    written, files = [], []
    for number, table in enumerate(tables):
        prefix = "" if len(tables) == 1 else f"table{number + 1}_"
        pictures = {f"{prefix}{picture.name}.png": picture for picture in pictures_of(table, costs)}
        for file, picture in pictures.items():
            content = to_png(picture.draw, WIDE if picture.wide else HALF)
            written.append(write_file(output / file, content))
        files.append(pictures)
    texts = {
        "report.csv": to_csv(tables, costs),
        "report.md": to_markdown(tables, costs, head, files),
        "report.html": to_html(tables, costs, head),
    }
    return [*written, *(write_file(output / name, text) for name, text in texts.items())]


def to_csv(tables: Sequence[Table], costs: Costs) -> str:
    """One line per variant, with `COLUMNS`."""
    writer = csv.DictWriter(text := io.StringIO(), COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(variant_rows(tables, costs))
    return text.getvalue()
