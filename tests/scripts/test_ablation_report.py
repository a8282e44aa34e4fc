"""The report, on folders like those that train.py leaves."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from pem_lightning.types import UserError
from scripts.ablation_report import main, read_runs, summarize, variant_name

NETWORK = {
    "_target_": "pem_lightning.build_pem",
    "backbone": "stdc1",
    "num_queries": 8,
    "num_layers": 3,
    "hidden_channels": 64,
}


def write_run(folder, *overrides, last=70.0, steps=600, max_steps=600, batch=4, **network):
    """Four validations that end at `last`; every second logged step is there."""
    seed = next((int(o.partition("=")[2]) for o in overrides if o.startswith("seed=")), 0)
    config = {
        "job": "train",
        "seed": seed,
        "task": {"name": "panoptic", "monitor": "val/PQ", "inference": {"overlap_threshold": 0.8}},
        "dataset": {"name": "synthetic"},
        "trainer": {"max_steps": max_steps},
        "recipe": {"global_batch_size": batch, "train_transform": {"crop_size": [64, 128]}},
        "network": {**NETWORK, **network},
    }
    (folder / ".hydra").mkdir(parents=True)
    (folder / "csv").mkdir()
    OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    OmegaConf.save(list(overrides), folder / ".hydra" / "overrides.yaml")
    lines = ["step,train/loss,val/PQ,val/PQ_things,val/PQ_stuff"]
    lines += [f"{step - 1},{100 / step},,," for step in range(10, steps + 1, 10)]
    lines += [f"{step - 1},,{last - (600 - step) / 10},{last - 5},{last + 5}" for step in range(150, steps + 1, 150)]
    (folder / "csv" / "metrics.csv").write_text("\n".join(lines) + "\n")
    if steps == max_steps:
        classes = [{"class": str(i)} for i in range(5)]
        (folder / "metrics.json").write_text(json.dumps({"step": steps, "val/PQ": last, "per_class": classes}))
    return folder


@pytest.fixture
def sweep(tmp_path):
    jobs = [
        ((), 70.0, {}),
        (("seed=1",), 72.0, {}),
        (("ablation=no_masking",), 60.0, {"masked": False}),
        (("seed=1", "ablation=no_masking"), 61.0, {"masked": False}),
        (("decoder_layers=2",), 65.0, {"num_layers": 2}),
    ]
    for number, (overrides, last, network) in enumerate(jobs):
        write_run(tmp_path / "sweep" / str(number), *overrides, last=last, **network)
    return tmp_path / "sweep"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "PEM"),
        (["ablation=prototype", "decoder_layers=6", "seed=3"], "PEM"),
        (
            ["task=panoptic", "dataset.root=/data", "recipe.max_steps=300", "trainer=cpu", "+scale=synthetic_small"],
            "PEM",
        ),
        (["ablation=no_csm"], "no CSM"),
        (["ablation=[no_masking,no_csm]", "decoder_layers=3"], "no masking + no CSM + 3 layers"),
        (["backbone=resnet50", "num_queries=50"], "resnet50 + 50 queries"),
        (["recipe.optimizer.lr=3e-4", "network.csm=false"], "recipe.optimizer.lr=3e-4 + network.csm=false"),
    ],
)
def test_variants_are_named_after_what_they_change(overrides, name):
    assert variant_name(overrides) == name


def test_statistics_over_seeds(sweep):
    runs, curves = read_runs([sweep])
    table = summarize(runs)
    assert list(table.index) == ["PEM", "no masking", "2 layers"]
    assert table.loc["PEM", "PQ"] == 71.0
    assert table.loc["PEM", "PQ_std"] == pytest.approx(2**0.5)
    assert table.loc["no masking", "difference"] == -10.5
    assert pd.isna(table.loc["PEM", "difference"])
    assert pd.isna(table.loc["2 layers", "PQ_std"])
    assert list(table["seeds"]) == [2, 2, 1]
    assert len(curves) == 5 * 4
    assert curves["step"].max() == 600


def test_unfinished_and_resumed_runs(tmp_path):
    """The former counts with its last validation, the latter has several logs, of which the later one wins."""
    write_run(tmp_path / "unfinished", "ablation=fpn", steps=320)
    resumed = write_run(tmp_path / "resumed")
    old = (resumed / "csv" / "metrics.csv").read_text().replace("599,,70.0", "599,,1.0")
    (resumed / "csv" / "metrics_before_step_300.csv").write_text(old)
    table = summarize(read_runs([tmp_path])[0])
    assert list(table.loc["FPN", ["step", "max_steps", "PQ"]]) == [320, 600, 70.0 - 30.0]
    assert table.loc["PEM", "PQ"] == 70.0


def test_broken_runs_are_left_out(sweep, capsys):
    (sweep / "0" / "csv" / "metrics.csv").unlink()
    (sweep / "1" / ".hydra" / "config.yaml").write_text("a: [")
    runs, _ = read_runs([sweep])
    assert len(runs) == 3
    assert capsys.readouterr().err.count("skipped") == 2


@pytest.mark.parametrize("path", ["nothing", "."])
def test_no_runs_is_one_line(tmp_path, monkeypatch, path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        read_runs([path])
    assert main([path]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_other_code_is_not_started(tmp_path, capsys):
    write_run(tmp_path / "run", _target_="os.system")
    assert main([str(tmp_path), "--output", str(tmp_path / "report"), "--no-latency"]) == 0
    assert "cannot measure PEM: only networks of build_pem" in capsys.readouterr().err


def test_the_report(sweep, tmp_path, capsys):
    write_run(sweep / "other", "seed=0", batch=8)  # another setting, hence a table of its own
    output = tmp_path / "report"
    assert main([str(sweep), "--output", str(output), "--size", "32x64", "--rounds", "1"]) == 0
    assert "6 runs, 3 variants" in capsys.readouterr().out
    markdown = (output / "report.md").read_text()
    assert "| no masking | 60.5 ± 0.7 | -10.5 |" in markdown
    assert "of 8 crops" in markdown
    page = (output / "report.html").read_text()
    assert page.count("<table") == 2
    assert page.count("data:image/png;base64,") == 5
    table = pd.read_csv(output / "report.csv", index_col="variant")
    assert (table["latency_low"] <= table["latency"]).all()
    assert table["parameters"].loc["2 layers"] < table["parameters"].loc["no masking"]
    assert {f"table1_{name}.png" for name in ("quality", "depth", "curves")} <= {p.name for p in output.iterdir()}
