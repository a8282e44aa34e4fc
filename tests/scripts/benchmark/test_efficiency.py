"""The study of a trained network's cheaper variants: each is a checkpoint, and what is there is not measured again."""

import json
from pathlib import Path

import pytest
import torch

from pem_lightning.inference.optimize import shorten
from scripts.benchmark import efficiency
from scripts.benchmark.__main__ import main
from scripts.benchmark.efficiency import Study, Variant, load
from scripts.benchmark.runtimes import Measurement
from tests.deploy.conftest import write_tiny_checkpoint

pytestmark = pytest.mark.slow

QUALITY = {"as trained": 70.0, "1 layers": 69.8, "12 queries": 69.6, "1 layers, 12 queries": 69.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with two layers and twenty queries, beside its drawn data set."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("trained") / "tiny.ckpt")


@pytest.fixture
def done(monkeypatch):
    """Commands and measurements that are asked for; nothing is run."""
    done = []

    def command(study, job, *arguments, log):
        path = Path(arguments[0].removeprefix("checkpoint="))
        name = next(v for v in study.rows if Variant(study.checkpoints[0].path, *options(v)).file == path.name)
        done.append(name)
        load(path)  # any program can
        log.mkdir(exist_ok=True)
        quality = QUALITY.get(name.removeprefix("tiny: "), 50.0)
        (log / "metrics.json").write_text(json.dumps({"val/PQ": quality}))

    def measure(path, precision, settings):
        done.append(path.name)
        return Measurement(0.1 if "1_layers" in path.name else 0.2, 1.0, 100.0)

    monkeypatch.setattr(Study, "command", command)
    monkeypatch.setattr(efficiency, "measure", measure)
    monkeypatch.setattr(efficiency, "count_gmacs", lambda network, height, width: 1.5)
    return done


def options(name):
    """A variant's options from its name."""
    layers = next((count for count in range(3) if f"{count} layers" in name), None)
    return layers, 12 if "12 queries" in name else None, 8 if "stride 8" in name else 4


def arguments(trained, output):
    root = trained.parent / "drawn"
    small = ("--queries", "12", "--sizes", "64x96", "--rounds", "2", "--no-int8", "--output", str(output))
    return ["efficiency", "--checkpoint", str(trained), "--root", str(root), *small]


def test_every_variant_once(trained, done, tmp_path, capsys):
    assert main(arguments(trained, tmp_path)) == 0
    report = capsys.readouterr().out
    assert "| tiny: as trained | 70.00 | +0.00 | 1.5 | 200 (200 to 200) | 1.00 |" in report
    assert "| tiny: 1 layers | 69.80 | -0.20 | 1.5 | 100 (100 to 100) | 0.50 |" in report
    assert "| tiny: 0 layers | 50.00 | -20.00 | 1.5 | 200 (200 to 200) | 1.00 |" in report
    assert "| tiny: masks at stride 8 | 50.00 |" in report
    assert "| tiny: 1 layers, 12 queries | 69.00 | -1.00 |" in report  # what loses little alone is also tried together
    assert {path.name for path in tmp_path.iterdir()} >= {"efficiency.md", "efficiency.json", "efficiency.png"}
    assert len(done) == 6 + 2 * 6
    done.clear()
    assert main(arguments(trained, tmp_path)) == 0  # all is there
    assert not done
    assert main([*arguments(trained, tmp_path), "--retime"]) == 0
    assert len(done) == 2 * 6


def test_another_network_of_the_same_name_begins_anew(trained, done, tmp_path):
    (tmp_path / "efficiency.json").write_text(
        json.dumps({"tiny: as trained": {"sha256": "0", "quality": 1.0, "milliseconds": {"64x96": [1.0, 1.0]}}})
    )
    assert main(arguments(trained, tmp_path)) == 0
    assert json.loads((tmp_path / "efficiency.json").read_text())["tiny: as trained"]["quality"] == 70.0


@torch.no_grad()
def test_variants_compute_what_they_are_called(trained, done, tmp_path):
    assert main(arguments(trained, tmp_path)) == 0
    network = load(trained).network
    images = torch.randn(1, 3, 64, 96)
    whole, coarse = network(images), load(tmp_path / "tiny__masks_at_stride_8.ckpt").network(images)
    assert coarse.mask_logits.shape == whole.mask_logits.shape
    assert not torch.equal(coarse.mask_logits, whole.mask_logits)
    early = load(tmp_path / "tiny__1_layers.ckpt").network(images)
    assert torch.equal(early.mask_logits, shorten(network, 1)(images).mask_logits)
    assert load(tmp_path / "tiny__12_queries.ckpt").network(images).class_logits.shape[1] == 12
    rows = json.loads((tmp_path / "efficiency.json").read_text())
    rankings = {name: row["ranking"] for name, row in rows.items() if "ranking" in row}
    assert set(rankings) == {"tiny: as trained", "tiny: 1 layers"}  # what a query does depends on the layers before
    assert all(sorted(ranking) == list(range(20)) for ranking in rankings.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--output"], "efficiency needs a folder"),
        (["--checkpoint", "gone.ckpt"], "gone.ckpt does not exist"),
    ],
)
def test_mistakes_are_one_line(trained, tmp_path, change, message, capsys):
    given = arguments(trained, tmp_path)
    if change == ["--output"]:
        given = given[:-2]
    else:
        given[2] = change[1]
    assert main(given) == 2
    assert message in capsys.readouterr().err
