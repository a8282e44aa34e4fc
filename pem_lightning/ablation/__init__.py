"""Ablations as tables and figures: reading runs, comparing variants, measuring them, and the report.

    runs = read_runs(["multirun/paper_attention"])
    for table in tabulate(runs):
        for variant in table.variants:
            print(variant.name, variant.statistic("PQ"))

`scripts/ablation_report.py` writes the report; `variant_rows` and `curve_rows` are its data, for a DataFrame.
"""

from pem_lightning.ablation.measure import Costs, Measurement, measure_variants, reuse_costs
from pem_lightning.ablation.report import write_report
from pem_lightning.ablation.rows import COLUMNS, curve_rows, variant_rows
from pem_lightning.ablation.runs import Run, read_runs
from pem_lightning.ablation.table import Statistic, Table, Variant, tabulate

__all__ = [
    "COLUMNS",
    "Costs",
    "Measurement",
    "Run",
    "Statistic",
    "Table",
    "Variant",
    "curve_rows",
    "measure_variants",
    "read_runs",
    "reuse_costs",
    "tabulate",
    "variant_rows",
    "write_report",
]
