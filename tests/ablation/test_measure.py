import json

import pytest
import torch

from pem_lightning import build_pem
from pem_lightning.ablation import Costs, Measurement, measure_variants, read_runs, reuse_costs, tabulate
from pem_lightning.ablation.measure import network_key
from pem_lightning.benchmark import Settings, Spread
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.types import UserError
from tests.ablation.conftest import write_run

SETTINGS = Settings(size=(64, 96), rounds=3, warmup=0, device="cpu")


def tables_of(*folders):
    return tabulate(read_runs(folders))


def test_variants_are_counted_and_timed_in_turn(tmp_path):
    write_run(tmp_path / "0", "num_queries=20", "decoder_layers=1")
    write_run(tmp_path / "1", "num_queries=20", "decoder_layers=2", "ablation=no_deep_supervision")
    tables = tables_of(tmp_path)
    said = []
    costs = measure_variants(tables, SETTINGS, say=said.append)
    one, two = (costs.of(variant) for variant in tables[0].variants)
    assert said[-3:] == ["round 1 of 3", "round 2 of 3", "round 3 of 3"]
    network = build_pem("stdc1", num_classes=19, num_queries=20, num_layers=1, auxiliary="always")
    assert one.parameters_m == count_parameters(network) / 1e6
    assert one.gmacs == count_gmacs(network, 64, 96)
    for measured in (one, two):
        spread = measured.latency_ms
        assert 0 < spread.min <= spread.low <= spread.median <= spread.high <= spread.max
    assert two.gmacs > one.gmacs
    assert costs.conditions["size"] == [64, 96]


def test_a_network_is_measured_once(tmp_path):
    write_run(tmp_path / "0", "num_queries=20", "decoder_layers=1")
    write_run(tmp_path / "1", "num_queries=20", "decoder_layers=1", "recipe.max_steps=700")
    tables = tables_of(tmp_path)
    costs = measure_variants(tables, SETTINGS, latency=False)
    assert len(tables) == 2
    assert len(costs.measurements) == 1
    assert costs.of(tables[1].variants[0]).latency_ms is None
    assert costs.of(tables[1].variants[0]).gmacs > 0


def test_classes_are_as_many_as_the_runs_tell(tmp_path):
    folder = write_run(tmp_path / "0", "decoder_layers=1")
    (folder / "metrics.json").write_text(json.dumps({"step": 600, "per_class": [{}] * 5}))
    (table,) = tables_of(tmp_path)
    expected = count_parameters(build_pem("stdc1", num_classes=5, num_queries=40, num_layers=1)) / 1e6
    assert measure_variants([table], SETTINGS, latency=False).of(table.variants[0]).parameters_m == expected


def test_what_cannot_be_built_is_noted_and_the_others_are_measured(tmp_path):
    write_run(tmp_path / "0", "decoder_layers=1")
    write_run(tmp_path / "1", "decoder_layers=1", "network.backbone=resnet99")
    write_run(tmp_path / "2", "decoder_layers=1", "network._target_=os.system")
    write_run(tmp_path / "3", "decoder_layers=1", "network.backbone={_target_:os.system}", "network.channels=64")
    (table,) = tables_of(tmp_path)
    said = []
    costs = measure_variants([table], SETTINGS, latency=False, say=said.append)
    notes = {variant.name: costs.of(variant).note for variant in table.variants}
    assert notes["PEM"] == ""
    assert "resnet99" in notes["resnet99"]
    assert "of its own kind" in notes["_target_=os.system"]
    assert "only those of networks.backbones" in notes["channels=64"]
    assert costs.of(table.default).gmacs > 0
    assert sum(line.startswith("cannot measure") for line in said) == 3


def test_a_backbone_that_the_experiment_builds_is_built(tmp_path):
    backbone = "network.backbone={_target_:pem_lightning.models.backbones.build_backbone,name:stdc1}"
    write_run(tmp_path / "0", "decoder_layers=1")
    write_run(tmp_path / "1", "decoder_layers=1", "network.channels=128", "network.mask_channels=128", backbone)
    (table,) = tables_of(tmp_path)
    costs = measure_variants([table], SETTINGS, latency=False)
    default, other = (costs.of(variant) for variant in table.variants)
    assert 0 < other.parameters_m < default.parameters_m


def test_a_backbone_that_cannot_be_built_says_why_in_its_own_words(tmp_path):
    backbone = "network.backbone={_target_:pem_lightning.models.backbones.build_backbone,name:stdc99}"
    write_run(tmp_path / "0", "decoder_layers=1", backbone)
    (table,) = tables_of(tmp_path)
    note = measure_variants([table], SETTINGS, latency=False).of(table.variants[0]).note
    assert note.startswith("unknown backbone 'stdc99': choose one of")


def test_measurements_are_reused_if_they_fit(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "0", "decoder_layers=1")
    tables = tables_of(tmp_path / "runs")
    path = tmp_path / "measurements.json"
    assert reuse_costs(path, tables, SETTINGS) is None
    conditions = measure_variants([], SETTINGS).conditions
    key = network_key(tables[0].variants[0])
    saved = Costs({key: Measurement(1.5, 2.5, Spread(1, 2, 3, 4, 5)), "other": Measurement(note="no")}, conditions)
    saved.save(path)
    assert reuse_costs(path, tables, SETTINGS) == saved
    assert reuse_costs(path, tables, SETTINGS, latency=False) is None
    assert reuse_costs(path, tables, Settings(size=(64, 64), rounds=3, warmup=0, device="cpu")) is None
    write_run(tmp_path / "runs" / "1", "decoder_layers=2")
    assert reuse_costs(path, tables_of(tmp_path / "runs"), SETTINGS) is None
    path.write_text("{")
    with pytest.raises(UserError, match="measure anew, without --reuse"):
        reuse_costs(path, tables, SETTINGS)


def test_random_weights_leave_the_callers_random_numbers_alone(tmp_path):
    write_run(tmp_path / "0", "decoder_layers=1")
    tables = tables_of(tmp_path)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    measure_variants(tables, SETTINGS, latency=False)
    assert torch.equal(torch.rand(3), expected)
