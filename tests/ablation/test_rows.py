from pem_lightning.ablation import COLUMNS, Costs, Measurement, curve_rows, read_runs, tabulate, variant_rows
from pem_lightning.ablation.measure import network_key
from pem_lightning.benchmark import Spread


def test_rows_have_all_columns_and_keep_numbers_as_they_are(sweep):
    tables = tabulate(read_runs([sweep]))
    default, one, *_ = tables[0].variants
    costs = Costs({network_key(one): Measurement(8.9, 50.5, Spread(1, 2, 3, 4, 5))})
    rows = variant_rows(tables, costs)
    assert all(tuple(row) == COLUMNS for row in rows)
    assert [row["variant"] for row in rows] == [v.name for v in tables[0].variants]
    assert rows[0]["is_default"]
    assert (rows[0]["PQ"], rows[0]["PQ_std"], rows[0]["AP"]) == (71.0, default.statistic("PQ").std, None)
    assert (rows[0]["seeds"], rows[0]["step"], rows[0]["max_steps"]) == (2, 600, 600)
    assert (rows[0]["latency_ms"], rows[0]["gmacs"]) == (None, None)
    assert (rows[1]["num_layers"], rows[1]["num_queries"], rows[1]["difference"]) == (1, 40, -10.5)
    assert (rows[1]["parameters_m"], rows[1]["gmacs"]) == (8.9, 50.5)
    assert (rows[1]["latency_low_ms"], rows[1]["latency_ms"], rows[1]["latency_high_ms"]) == (2, 3, 4)


def test_curves_have_a_row_per_validation(sweep):
    tables = tabulate(read_runs([sweep]))
    rows = [row for row in curve_rows(tables) if row["variant"] == "PEM" and row["seed"] == 1]
    assert [(row["step"], row["value"]) for row in rows] == [(150, 42.0), (300, 62.0), (450, 68.0), (600, 72.0)]
    assert {row["metric"] for row in rows} == {"PQ"}
    assert {row["metric"] for row in curve_rows(tables, "mIoU")} == {"mIoU"}
