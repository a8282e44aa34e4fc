import pytest

from pem_lightning.ablation import Costs, Measurement, read_runs, tabulate
from pem_lightning.ablation.figures import HALF, WIDE, pictures_of
from pem_lightning.ablation.measure import network_key
from pem_lightning.ablation.style import LIGHT
from pem_lightning.benchmark import Spread
from tests.ablation.conftest import write_run


@pytest.fixture
def table(sweep):
    return tabulate(read_runs([sweep]))[0]


def costs_of(table, latency=True):
    spreads = [Spread(*(10.0 * i + j for j in range(5))) for i in range(1, 9)]
    measured = zip(table.variants, spreads, strict=False)
    return Costs({network_key(v): Measurement(1.0, s.median / 2, s if latency else None) for v, s in measured})


def pictures(table, costs):
    return {picture.name: picture for picture in pictures_of(table, costs)}


def points(axes):
    return sorted((c[0].get_xdata()[0], c[0].get_ydata()[0]) for c in axes.containers)


def test_all_figures_of_a_sweep(table):
    found = pictures(table, costs_of(table))
    assert list(found) == ["quality", "depth", "curves_depth", "curves_others"]
    assert found["quality"].wide


def test_quality_against_latency_shows_the_tables_numbers_and_names(table):
    figure = pictures(table, costs_of(table))["quality"].draw(LIGHT, WIDE)
    (axes,) = figure.axes
    # The learning rate changes nothing in the network: it costs what the default does.
    by_hand = [(22.0, 60.5), (32.0, 67.5), (42.0, 65.0), (42.0, 71.0)]
    assert points(axes) == by_hand
    assert {text.get_text() for text in axes.texts} == {v.name for v in table.variants}
    assert "ms" in axes.get_xlabel()


def test_without_latencies_quality_is_shown_against_operations(table):
    picture = pictures(table, costs_of(table, latency=False))["quality"]
    (axes,) = picture.draw(LIGHT, WIDE).axes
    assert axes.get_xlabel() == "GMACs"
    assert points(axes)[0] == (11.0, 60.5)
    assert "quality" not in pictures(table, Costs())


def test_one_costly_variant_does_not_crowd_the_others(table):
    costs = costs_of(table)
    costs.measurements[network_key(table.variants[1])] = Measurement(1.0, 900.0, Spread(*[900.0] * 5))
    (axes,) = pictures(table, costs)["quality"].draw(LIGHT, WIDE).axes
    assert axes.get_xscale() == "log"
    (linear,) = pictures(table, costs_of(table))["quality"].draw(LIGHT, WIDE).axes
    assert linear.get_xscale() == "linear"


def test_depth_has_only_what_differs_in_nothing_else(table):
    upper, lower = pictures(table, costs_of(table))["depth"].draw(LIGHT, HALF).axes
    line = upper.containers[0][0]
    assert list(line.get_xdata()) == [1, 3, 6]
    assert list(line.get_ydata()) == [60.5, 67.5, 71.0]
    assert list(lower.containers[0][0].get_ydata()) == [22.0, 32.0, 42.0]
    (alone,) = pictures(table, Costs())["depth"].draw(LIGHT, HALF).axes
    assert alone.get_ylabel() == "PQ, percent"


def test_curves_are_means_over_the_seeds_with_bands(table):
    picture = pictures(table, Costs())["curves_depth"]
    (axes,) = picture.draw(LIGHT, HALF).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {
        "1 layer": [30.5, 50.5, 56.5, 60.5],
        "3 layers": [37.5, 57.5, 63.5, 67.5],
        "PEM (6 layers)": [41.0, 61.0, 67.0, 71.0],
    }
    assert len(axes.collections) == 3
    assert "bands" in picture.caption


def test_one_run_alone_has_its_curve_and_nothing_else(tmp_path):
    (table,) = tabulate(read_runs([write_run(tmp_path / "run", values=[1, 2, 3, 4])]))
    found = pictures(table, costs_of(table))
    assert list(found) == ["curves"]
    assert found["curves"].caption == "PQ over training: PEM."


def test_many_curves_are_cut_to_the_best(tmp_path):
    for i in range(14):
        write_run(tmp_path / str(i), f"recipe.optimizer.lr={i + 1}e-5", values=[1.0, 2.0, 3.0, float(i)])
    (table,) = tabulate(read_runs([tmp_path]))
    picture = pictures(table, Costs())["curves_others"]
    (axes,) = picture.draw(LIGHT, HALF).axes
    assert len(axes.lines) == 12
    assert "the best 12 of 14" in picture.caption


def test_runs_without_a_validation_have_no_figures(tmp_path):
    (table,) = tabulate(read_runs([write_run(tmp_path / "run", steps=20)]))
    assert pictures(table, costs_of(table)) == {}
