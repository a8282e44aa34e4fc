"""Our own checkpoints: read, refused, and brought over from version d805b9e."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from pem_lightning import build_pem
from pem_lightning.checkpoints import convert_old, load_network, load_weights, read_checkpoint
from pem_lightning.checkpoints.checkpoint import CHECKPOINT_KEY, SHIPPED, slim_content
from pem_lightning.checkpoints.pretrained import read_weights
from pem_lightning.cli import jobs
from pem_lightning.inference.predictor import Predictor
from pem_lightning.preprocess import normalize
from pem_lightning.types import DatasetInfo, UserError
from tests.checkpoint_files import CLASSES, Calls, write_checkpoint
from tests.jobs import TINY, call

OLD = Path(__file__).with_name("d805b9e.ckpt")
"""Written by train.py of d805b9e; its weights were then replaced by overlapping windows of a few random numbers."""


@pytest.fixture(scope="module")
def network():
    return build_pem("resnet18", num_classes=1, num_layers=1, num_queries=5)


@pytest.fixture
def path(tmp_path, network):
    return write_checkpoint(tmp_path / "a.ckpt", network)


def test_round_trip(path, network):
    checkpoint = read_checkpoint(path)
    assert (checkpoint.step, checkpoint.config, checkpoint.overrides) == (12, {"a": 1}, ["seed=3"])
    assert checkpoint.info.classes[0].color == (1, 2, 3)
    assert checkpoint.info.thing_classes == {0}
    assert (checkpoint.raw, checkpoint.resumable) == (None, False)
    with torch.device("meta"):
        other = build_pem("resnet18", num_classes=1, num_layers=1, num_queries=5)
    load_network(other.to_empty(device="cpu"), checkpoint)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("change", [{"num_classes": 2}, {"num_layers": 2}, {"backbone": "resnet34"}])
def test_a_checkpoint_that_does_not_fit_is_named_with_the_cure(path, change):
    with torch.device("meta"):
        other = build_pem(**{"backbone": "resnet18", "num_classes": 1, "num_layers": 1, "num_queries": 5, **change})
    with pytest.raises(UserError, match=r"a\.ckpt does not fit .* differences\): use the backbone"):
        load_network(other, read_checkpoint(path))


def test_damaged_and_foreign_files_are_refused(tmp_path, path, capsys):
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"a\.ckpt is damaged"):
        read_checkpoint(path)
    torch.save({"state_dict": {}, "evil": Calls(print, "executed")}, path)
    with pytest.raises(UserError, match="not written by train"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_8_bits_follow_the_size_of_their_neighbours(path):
    """Rounding errors are small in every block of 64, also beside much larger values and zeros."""
    weight = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 5)[:, None]
    weight[0, 100:300] = 0
    ours = slim_content(read_checkpoint(path)._replace(network={"a": weight, "b": weight[:4]}), int8=True)
    stored = ours["state_dict"]
    assert {name: value.dtype for name, value in stored.items()} == {
        "network.a": torch.int8,
        "network.b": torch.float32,
        "network.a.scales": torch.bfloat16,
    }
    torch.save(ours, path)
    read = read_checkpoint(path).network
    assert read.keys() == {"a", "b"}
    assert torch.equal(read["b"], weight[:4])
    for given, found in zip(weight.flatten().split(64), read["a"].flatten().split(64), strict=True):
        assert (found - given).abs().max() <= given.abs().max() * 1.01 / 254


def test_a_file_for_others_has_no_paths(path):
    config = {
        "dataset": {"root": "../mine", "datamodule": {"root": "/home/me", "task": "semantic"}, "names": ["/a", "b"]},
        "task": {"monitor": "val/mIoU"},
        "weights": "/home/me/w.pth",
        "output_dir": "outputs/a",
        "logger": {"wandb": {"entity": "me"}},
    }
    kept = ["dataset=camvid", "~recipe.ema", "weights=torchvision/resnet50", "recipe.lr=1e-3"]
    private = [
        "dataset.root=mine",
        "hydra.run.dir=a",
        "weights=/home/w.pth",
        "+a.b='~/c'",
        "a=[b,C:\\d]",
        "logger.x.y=1",
    ]
    checkpoint = read_checkpoint(path)._replace(config=config, overrides=[*private, *kept])
    ours = slim_content(checkpoint, int8=True)[CHECKPOINT_KEY]
    assert ours["config"] == {
        "dataset": {"datamodule": {"task": "semantic"}, "names": [None, "b"]},
        "task": {"monitor": "val/mIoU"},
        "weights": None,
    }
    assert ours["overrides"] == kept
    assert slim_content(checkpoint)[CHECKPOINT_KEY]["config"] == config


class TestShipped:
    def test_its_file_is_small_and_of_nobody(self):
        path = SHIPPED["camvid"]
        assert path.stat().st_size <= 16_000_000
        checkpoint = read_checkpoint("camvid")
        assert (checkpoint.path, checkpoint.info.name, checkpoint.resumable) == (path, "camvid", False)
        assert "dataset=camvid" in checkpoint.overrides
        assert '"root"' not in json.dumps([checkpoint.config, checkpoint.overrides])
        assert path.with_suffix(".md").is_file()

    def test_only_a_file_of_that_name_comes_first(self, tmp_path, monkeypatch, network):
        monkeypatch.chdir(tmp_path)
        Path("camvid").mkdir()
        assert read_checkpoint("camvid").info.name == "camvid"
        Path("camvid").rmdir()
        write_checkpoint(Path("camvid"), network)
        assert read_checkpoint("camvid").info.name == "toy"

    def test_an_unknown_name_says_what_ships(self):
        with pytest.raises(UserError, match=r"checkpoint camvit does not exist: .*; networks that ship: camvid$"):
            read_checkpoint("camvit")
        with pytest.raises(UserError, match=r"weights=camvit does not exist: .*, camvid$"):
            read_weights("camvit")

    def test_a_training_starts_from_it(self):
        network = build_pem("efficientnet_lite0", num_classes=1, num_layers=3, num_queries=50, mask_features="levels")
        report = load_weights(network, "camvid", DatasetInfo.from_dict({"name": "toy", "classes": list(CLASSES)}))
        assert len(report.loaded) > 400
        assert all("class_head" in name for name in report.reinitialized)
        assert (report.missing, report.mismatched) == ([], [])
        state = read_checkpoint("camvid").network
        assert all(torch.equal(network.state_dict()[name], state[name]) for name in report.loaded)

    def test_it_is_exported_into_the_working_folder(self, tmp_path, monkeypatch, capsys):
        def stop(checkpoint, output, options, **_):
            raise UserError(f"{checkpoint.path.name} as {output}")

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(jobs, "export_checkpoint", stop)
        assert call("export", "checkpoint=camvid") == 2
        assert "error: pem_lite0_camvid.ckpt as camvid.onnx\n" in capsys.readouterr().err

    @pytest.mark.slow
    def test_it_segments_photographs_at_the_scale_of_its_training(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        street = np.zeros((900, 1200, 3), np.uint8)
        street[:400], street[400:] = (150, 200, 250), (90, 90, 95)
        Image.fromarray(street).save("street.png")
        assert call("predict", "checkpoint=camvid", "input=street.png", "output=out") == 0
        assert call("train", *TINY, "weights=camvid", "hydra.run.dir=run") == 2  # another backbone
        assert "weights=camvid (PEM-Lightning, step " in capsys.readouterr().err
        predictor = Predictor("camvid", device="cpu")
        assert predictor.prepare(street).shape == (3, 360, 480)
        found = predictor(street).semantic
        assert np.array_equal(np.array(Image.open("out/street_semantic.png")), found)
        assert found.shape == (900, 1200)


@pytest.fixture(scope="module")
def checkpoint():
    return read_checkpoint(OLD)


class TestOldVersion:
    def test_its_experiment_is_in_todays_words(self, checkpoint):
        assert (checkpoint.step, checkpoint.info.num_classes, checkpoint.info.category_ids[:2]) == (1, 19, (7, 8))
        assert checkpoint.config["recipe"]["micro_batch_size"] == 2
        assert "max_per_device" not in checkpoint.config["recipe"]
        assert "recipe.micro_batch_size=2" in checkpoint.overrides
        assert not any("max_per_device" in override for override in checkpoint.overrides)

    @pytest.mark.parametrize("which", ["averaged", "last_step"])
    def test_its_network_answers_as_it_did(self, checkpoint, which):
        expected = json.loads(OLD.with_suffix(".json").read_text())[which]
        network = instantiate(checkpoint.config["network"], num_classes=19).eval()
        weights = checkpoint.network if which == "averaged" else checkpoint.raw
        load_network(network, checkpoint._replace(network=weights))
        image = torch.randint(256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            predictions = network(normalize(image)[None])
        expected_logits = torch.tensor(expected["class_logits"])
        torch.testing.assert_close(predictions.class_logits[0], expected_logits, rtol=0, atol=1e-5)
        mean = predictions.mask_logits[0].mean((1, 2))
        torch.testing.assert_close(mean, torch.tensor(expected["mask_logits_mean"]), rtol=0, atol=1e-5)

    @pytest.mark.slow
    def test_it_evaluates_to_the_same_digits(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert call("evaluate", f"checkpoint={OLD}", "dataset.root=drawn", "trainer=cpu", "hydra.run.dir=again") == 0
        expected = json.loads(OLD.with_suffix(".json").read_text())["averaged"]["metrics"]
        metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-9)

    def test_it_predicts(self, checkpoint):
        result = Predictor(checkpoint, device="cpu")(torch.zeros(40, 60, 3, dtype=torch.uint8).numpy())
        assert result.panoptic.shape == (40, 60)

    def test_todays_content_stays_as_it_is(self, path):
        content = torch.load(path, weights_only=True)
        converted = convert_old(content)
        assert converted[CHECKPOINT_KEY] == content[CHECKPOINT_KEY]
        assert converted["state_dict"] is content["state_dict"]

    def test_targets_and_overrides_get_todays_names(self):
        old = {"backbone": {"module": {"_target_": "pem_lightning.networks.backbones.timm.TimmBackbone", "name": "a"}}}
        overrides = {
            "recipe.max_per_device=null": "recipe.micro_batch_size=null",
            "+recipe.batch_size=4": "+recipe.global_batch_size=4",
            "recipe=synthetic_panoptic": "recipe=synthetic",
            "task=semantic": "task=semantic",
        }
        info = {"name": "toy", "classes": []}
        content = {
            CHECKPOINT_KEY: {"config": old, "overrides": list(overrides), "dataset_info": info},
            "state_dict": {},
        }
        ours = convert_old(content)[CHECKPOINT_KEY]
        module = ours["config"]["backbone"]["module"]
        assert module == {"_target_": "pem_lightning.models.backbones.timm.TimmBackbone", "name": "a"}
        assert ours["overrides"] == list(overrides.values())
