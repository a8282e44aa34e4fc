import os
import statistics

import pytest

from pem_lightning.ablation import Statistic, read_runs, tabulate
from tests.ablation.conftest import write_run


def test_statistics_over_seeds():
    assert Statistic.of([70.0, 72.0]) == Statistic(71.0, pytest.approx(statistics.stdev([70, 72])), (70.0, 72.0))
    assert Statistic.of([3.0]).std is None


def test_a_sweep_is_one_table_with_the_default_first(sweep):
    (table,) = tabulate(read_runs([sweep]))
    assert [v.name for v in table.variants] == ["PEM", "1 layer", "3 layers", "optimizer.lr=0.0003"]
    assert table.title == "synthetic, panoptic, 600 steps"
    assert table.scale == "4 crops of 128 x 256 per step"
    assert table.columns == {"PQ": "PQ", "things": "PQ_things", "stuff": "PQ_stuff", "mIoU": "mIoU"}
    assert len(table.runs) == 7
    default, one, three, lr = table.variants
    assert table.default is default
    assert [run.seed for run in default.runs] == [0, 1]
    assert default.statistic("PQ") == Statistic.of([70.0, 72.0])
    assert three.statistic("PQ_things") == Statistic.of([61.0, 64.0])
    assert lr.statistic("PQ") == Statistic(65.0, None, (65.0,))
    assert [table.difference(v) for v in table.variants] == [None, -10.5, -3.5, -6.0]
    assert (one.num_layers, one.step, one.progress, one.finished) == (1, 600, "600", True)


def test_what_all_runs_share_is_said_once_unless_it_is_an_ablation(tmp_path):
    shared = ("recipe.optimizer.lr=3e-4", "backbone=resnet18", "ablation=no_csm", "dataset.datamodule.num_train=8")
    write_run(tmp_path / "0", *shared)
    write_run(tmp_path / "1", *shared, "network.masked=false")
    (table,) = tabulate(read_runs([tmp_path]))
    assert [v.name for v in table.variants] == ["no CSM", "no masking, no CSM"]
    assert table.scale.endswith("; in all runs: dataset.num_train=8, resnet18, optimizer.lr=0.0003")
    assert table.default is None
    assert table.difference(table.variants[0]) is None


def test_other_tasks_and_scales_have_their_own_tables(tmp_path):
    write_run(tmp_path / "0", values=[1, 2, 3, 4])
    write_run(tmp_path / "1", "recipe.max_steps=300", values=[9.0, 9.5], steps=300)
    write_run(tmp_path / "2", "task=semantic", values=[5, 6, 7, 8])
    tables = tabulate(read_runs([tmp_path]))
    assert [t.title for t in tables] == [
        *("synthetic, panoptic, 600 steps", "synthetic, panoptic, 300 steps", "synthetic, semantic, 600 steps"),
    ]
    assert [v.name for t in tables for v in t.variants] == ["PEM"] * 3
    assert tables[2].columns == {"mIoU": "mIoU"}
    assert tables[2].variants[0].statistic("mIoU").mean == 8


def test_the_last_validation_counts_and_not_the_best(tmp_path):
    write_run(tmp_path / "0", values=[10, 90, 20, 30])
    (table,) = tabulate(read_runs([tmp_path]))
    assert table.variants[0].statistic("PQ").mean == 30


def test_unfinished_runs_do_not_count_next_to_finished_ones(tmp_path):
    write_run(tmp_path / "0", "seed=0", values=[10, 20, 30, 40])
    write_run(tmp_path / "1", "seed=1", values=[11, 21], steps=310)
    (table,) = tabulate(read_runs([tmp_path]))
    (variant,) = table.variants
    assert [run.seed for run in variant.counted] == [0]
    assert variant.statistic("PQ").values == (40,)
    assert variant.finished


def test_unfinished_runs_alone_meet_at_their_last_common_validation(tmp_path):
    write_run(tmp_path / "0", values=[10, 20, 30, 40])
    write_run(tmp_path / "1", "seed=0", "ablation=no_csm", values=[8, 18, 28], steps=470)
    write_run(tmp_path / "2", "seed=1", "ablation=no_csm", values=[9, 19], steps=310)
    write_run(tmp_path / "3", "seed=2", "ablation=no_csm", steps=20)
    write_run(tmp_path / "4", "ablation=fpn", steps=20)
    (table,) = tabulate(read_runs([tmp_path]))
    _, no_csm, fpn = table.variants
    assert no_csm.step == 300
    assert no_csm.statistic("PQ").values == (18, 19)
    assert not no_csm.finished
    assert no_csm.progress == "310 of 600"
    assert table.difference(no_csm) is None  # not after the same number of steps
    assert (fpn.step, fpn.counted, fpn.statistic("PQ"), fpn.progress) == (None, (), None, "20 of 600")


def test_of_one_seed_the_run_that_came_farthest_counts_and_then_the_newest(tmp_path):
    write_run(tmp_path / "0", values=[10, 20, 30, 40])
    write_run(tmp_path / "1", values=[11, 21, 31, 41])
    write_run(tmp_path / "2", values=[12], steps=150)
    for age, name in ((0, "0"), (100, "1"), (200, "2")):
        os.utime(tmp_path / name / "csv" / "metrics.csv", (age, age))
    said = []
    (table,) = tabulate(read_runs([tmp_path]), said.append)
    (run,) = table.variants[0].runs
    assert run.path == tmp_path / "1"
    assert len(said) == 2
    assert said[0].startswith(f"left out {tmp_path / '2'}")
