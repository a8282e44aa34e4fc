"""PEM beside other networks on CamVid: what is compared, what is resumed, and that nothing is computed twice.

A small stand-in for segmentation_models_pytorch runs everywhere; the real networks need the real library.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pem_lightning.checkpoints.pretrained import read_weights
from pem_lightning.data.datamodule import collate_train
from pem_lightning.models.backbones import build_backbone
from pem_lightning.models.flops import count_gmacs
from pem_lightning.preprocess import normalize, pad_batch
from pem_lightning.processes import Interrupted
from pem_lightning.training.module import PEMModule
from pem_lightning.training.signals import StopSignals
from pem_lightning.types import UserError
from scripts.benchmark import camvid, camvid_baselines
from scripts.benchmark.__main__ import main
from scripts.benchmark.camvid_baselines import ARCHITECTURES, EncoderDecoder, Training
from tests.data.damage import save
from tests.jobs import ROOT, call

TINY = (
    "weights=null",
    "dataset.check=false",
    "recipe.num_points=64",
    "recipe.train_transform.crop_size=[32,64]",
    "recipe.train_transform.shortest_edges=[32,48]",
    "recipe.eval_transform.shortest_edge=null",
    "recipe.eval_transform.max_size=null",
    "backbone.module={_target_:tests.models.randomize.TinyBackbone}",
    "network.num_layers=1",
    "network.num_queries=10",
    "network.hidden_channels=32",
)
CITIES = {"train": 5, "val": 2, "test": 1}  # images

try:
    camvid_baselines.import_library()
    WHY_NOT = ""
except UserError as error:
    WHY_NOT = str(error)
needs_library = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images):
        return [self.model(images)]


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout2d(0.5)

    def forward(self, features):
        return self.dropout(features[-1])


class StandIn(nn.Module):
    """Encoder, decoder and head by the library's names."""

    def __init__(self, encoder, encoder_weights, classes):
        super().__init__()
        assert (encoder, encoder_weights) == ("tu-tf_efficientnet_lite0", None)
        self.encoder, self.decoder = Features(), Last()
        self.segmentation_head = nn.Sequential(nn.Conv2d(8, classes, 1), nn.UpsamplingBilinear2d(scale_factor=4))


@pytest.fixture
def library(monkeypatch):
    stand_in = types.SimpleNamespace(**dict.fromkeys(ARCHITECTURES.values(), StandIn))
    monkeypatch.setattr(camvid_baselines, "import_library", lambda: stand_in)


@pytest.fixture
def root(tmp_path):
    """Drawn frames of 36 x 50, no two alike, with void."""
    rng = np.random.default_rng(0)
    for split, count in CITIES.items():
        for number in range(count):
            save(tmp_path / "data" / split / f"{split}_{number}.png", rng.integers(0, 256, (36, 50, 3), np.uint8))
            classes = np.repeat(np.repeat(rng.integers(0, 12, (3, 5), np.uint8), 12, 0), 10, 1)
            save(tmp_path / "data" / f"{split}annot" / f"{split}_{number}.png", classes)
    return tmp_path / "data"


def experiment(root, *more, steps=4, split="val"):
    options = argparse.Namespace(root=root, workers=0, seed=3, batch=2, overrides=[*TINY, *more])
    return camvid.overrides(options, steps, 1e-2, split)


def test_the_papers_pem_is_a_network_beside_the_recipes():
    options = argparse.Namespace(
        root=Path("frames"), output=Path("out"), batch=4, workers=1, seed=0, overrides=["num_queries=9"]
    )
    plans = [camvid.plan(options, name, 1e-3, 8, "final") for name in ("pem", "pem_paper")]
    networks = [dict(camvid_baselines.compose_experiment(one.overrides).network) for one in plans]
    assert [network.pop("mask_features") for network in networks] == ["levels", "pyramid"]
    assert networks[0] == networks[1]
    assert networks[0]["num_queries"] == 9
    assert plans[0].folder != plans[1].folder


def arguments(root, *more):
    small = ("--images", "4", "--trial-images", "2", "--batch", "2", "--workers", "0", "--rounds", "1", "--warmup", "0")
    return ["camvid", "--root", str(root), "--output", str(root.parent / "out"), *small, *more, "--overrides", *TINY]


@pytest.fixture
def in_this_process(monkeypatch):
    """Scripts run here, which spares their imports; returns what was run."""
    started = []

    def run(script, *given):
        started.append((script, *given))
        if script.endswith("camvid_baselines.py"):
            assert camvid_baselines.main(*given) == 0
        else:
            assert call(Path(script).stem, *given) == 0

    monkeypatch.setattr(camvid, "run_script", run)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    return started


def test_both_train_on_the_same_batches(root, monkeypatch):
    """Five images make two batches of two: the third one is of the next epoch. A resumed training skips the first."""
    seen = []
    step = PEMModule.training_step
    monkeypatch.setattr(PEMModule, "training_step", lambda *a: (seen.append(a[1]), step(*a))[1])
    pictures = (*camvid.NO_PICTURES, "callbacks.curves=null", "callbacks.best=null", "logger=none")
    assert call("train", *experiment(root), f"hydra.run.dir={root.parent / 'run'}", *pictures) == 0
    assert len(seen) == 4
    cfg = camvid_baselines.compose_experiment(experiment(root))
    collate = partial(collate_train, task="semantic")
    for start in (0, 3):
        batches = camvid_baselines.training_batches(cfg, start, collate)
        for expected in seen[start:]:
            batch = next(batches)
            assert batch.names == expected.names
            for mine, theirs in zip(batch.images, expected.images, strict=True):
                assert torch.equal(mine, theirs)
            for mine, theirs in zip(batch.targets, expected.targets, strict=True):
                assert torch.equal(mine.labels, theirs.labels)
                assert torch.equal(mine.masks, theirs.masks)
    # What the baselines learn from is that, too.
    images, classes = next(camvid_baselines.training_batches(cfg))
    assert torch.equal(images, pad_batch(seen[0].images, [])[0])
    for found, target in zip(classes, seen[0].targets, strict=True):
        assert found[~target.masks.any(0)].eq(255).all()
        assert all(found[mask].eq(label).all() for label, mask in zip(*target, strict=True))


def test_learning_rates_and_decay_are_those_of_pem(library, root):
    cfg = camvid_baselines.compose_experiment(experiment(root, "recipe.parameter_groups.backbone_lr_multiplier=0.25"))
    training = Training("fpn", cfg)
    names = {parameter: name for name, parameter in training.network.named_parameters()}
    rates = {names[p]: g["initial_lr"] for g in training.optimizer.param_groups for p in g["params"]}
    assert rates.keys() == set(names.values())
    assert {rate for name, rate in rates.items() if name.startswith("backbone.")} == {0.25e-2}
    assert {rate for name, rate in rates.items() if not name.startswith("backbone.")} == {1e-2}
    decays = {names[p]: g["weight_decay"] for g in training.optimizer.param_groups for p in g["params"]}
    assert decays["backbone.model.1.weight"] == 0
    assert decays["backbone.model.0.weight"] == cfg.recipe.parameter_groups.weight_decay > 0


def test_logits_have_the_images_size_and_void_is_not_learned(library, root):
    training = Training("fpn", camvid_baselines.compose_experiment(experiment(root)))
    images = torch.randn(2, 3, 36, 50)
    classes = torch.full((2, 36, 50), 255)
    classes[0, :4] = 3
    torch.manual_seed(0)
    logits = training.network(images)
    assert logits.shape == (2, 11, 36, 50)
    expected = -logits.log_softmax(1)[0, 3, :4].mean()
    torch.manual_seed(0)
    torch.testing.assert_close(training.learn(images, classes), expected.detach())


@pytest.mark.parametrize("decay", ["null", "0.5"])
def test_a_stopped_training_goes_on_bit_for_bit(library, root, tmp_path, monkeypatch, decay):
    chosen = experiment(root, f"recipe.ema_decay={decay}", "recipe.warmup_steps=2")
    expected = camvid_baselines.train("fpn", tmp_path / "whole", chosen)
    learn = Training.learn

    def stop(self, images, classes):
        loss = learn(self, images, classes)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(Training, "learn", stop)
        with pytest.raises(Interrupted):
            camvid_baselines.train("fpn", tmp_path / "stopped", chosen)
    assert signal.getsignal(signal.SIGTERM) == before
    found = camvid_baselines.train("fpn", tmp_path / "stopped", chosen)
    assert found["miou"] == expected["miou"]
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "stopped")]
    assert states[0]["step"] == states[1]["step"] == 4
    for part in {"network", "average"} & states[0].keys():
        for name, value in states[0][part].items():
            assert torch.equal(value, states[1][part][name]), name
    assert ("average" in states[0]) == (decay != "null")
    again = camvid_baselines.train("fpn", tmp_path / "whole", chosen)  # there is nothing left to do but to validate
    assert again == expected


def test_the_average_is_what_is_evaluated(library, root, tmp_path):
    chosen = experiment(root, "recipe.ema_decay=0.5")
    camvid_baselines.train("fpn", tmp_path, chosen)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    network = camvid_baselines.load_trained("fpn", tmp_path, chosen)
    name = "head.0.weight"
    assert torch.equal(network.state_dict()[name], state["average"][f"module.{name}"])
    assert not torch.equal(network.state_dict()[name], state["network"][name])


def test_quality_is_counted_over_labelled_pixels_of_whole_frames(library, root):
    """Every pixel is called sky: its IoU is its share of what is labelled."""
    cfg = camvid_baselines.compose_experiment(experiment(root))
    network = EncoderDecoder("fpn", 11, None)
    nn.init.zeros_(network.head[0].weight)
    network.head[0].bias.data = torch.eye(11)[0]
    found = camvid_baselines.evaluate(network, camvid_baselines.build_datamodule(cfg))
    maps = np.stack([np.array(Image.open(path)) for path in (root / "valannot").iterdir()])
    labelled = maps[maps < 11]
    share = 100 * (labelled == 0).mean()
    assert found["iou"]["sky"] == pytest.approx(share)
    assert found["miou"] == pytest.approx(share / len(np.unique([0, *labelled])))


def test_the_best_rate_is_trained_and_nothing_is_done_twice(library, root, monkeypatch, capsys):
    done = []
    quality = {0.1: 30.0, 0.3: 50.0, 0.2: 40.0}

    def train(one, options):
        done.append(("train", one.network, one.lr, one.images))
        return {
            "miou": quality[one.lr] + 0.5 * (one.network == "pem"),
            "iou": dict.fromkeys(NAMES, 1.0),
            "minutes": 3.0,
        }

    def test(one, options):
        done.append(("test", one.network, one.lr, one.images))
        return {"miou": 44.0, "iou": {**dict.fromkeys(NAMES, 2.0), "sky": None}}

    def measure(runs, options):
        measured = {"parameters": 5_000_000, "gmacs": 7.0, "milliseconds": {"plain": [3.0], "fast path": [2.0]}}
        return [36, 50], {one.network: dict(measured) for one in runs}

    for name, fake in (("train", train), ("test", test), ("measure", measure)):
        monkeypatch.setattr(camvid, name, fake)
    given = ("--networks", "pem", "fpn", "--pem-lrs", "0.2", "--lrs", "0.1", "0.3")
    assert main(arguments(root, *given)) == 0
    assert done == [
        ("train", "pem", 0.2, 4),  # a single rate needs no trial
        ("train", "fpn", 0.1, 2),
        ("train", "fpn", 0.3, 2),
        ("train", "fpn", 0.3, 4),
    ]
    report = capsys.readouterr().out
    assert "| pem | 0.2 | 4 | 3 | 40.5 |  | 5.00 | 7.00 | 3 (3 to 3) | 2 (2 to 2) |" in report
    assert "| fpn | 0.3 | 4 | 3 | 50.0 |  | 5.00 |" in report
    assert "| fpn | 30.0 | 50.0 |" in report
    assert "| IoU test |" not in report
    done.clear()
    assert main(arguments(root, *given, "--test")) == 0
    assert done == [("test", "pem", 0.2, 4), ("test", "fpn", 0.3, 4)]
    done.clear()
    assert main(arguments(root, *given)) == 0  # what was answered once is shown
    assert main(arguments(root, *given, "--test")) == 0
    assert done == []
    out = root.parent / "out"
    report = (out / "camvid.md").read_text()
    assert "| pem | 0.2 | 4 | 3 | 40.5 | 44.0 |" in report
    assert "| IoU test | sky | building |" in report
    assert "| pem | - | 2.0 |" in report
    content = json.loads((out / "camvid.json").read_text())
    assert content["networks"]["fpn"]["test"]["miou"] == 44.0
    with Image.open(out / "camvid.png") as picture:
        assert picture.width > 600
    capsys.readouterr()
    assert main([*arguments(root, *given), "recipe.num_queries=9"]) == 2
    assert "settings.json has another overrides, recipe: go on with that, or" in capsys.readouterr().err
    assert done == []


NAMES = camvid.CAMVID.class_names


@pytest.mark.slow
def test_pem_and_a_baseline_from_beginning_to_end(library, root, in_this_process, capsys):
    given = ("--networks", "pem", "fpn", "--pem-lrs", "1e-3", "--lrs", "1e-3", "--test")
    assert main(arguments(root, *given)) == 0
    assert [Path(script).name for script, *_ in in_this_process] == [
        "train.py",
        "evaluate.py",
        *["camvid_baselines.py"] * 2,
    ]
    content = json.loads((root.parent / "out" / "camvid.json").read_text())
    assert content["size"] == [36, 50]
    for one in content["networks"].values():
        assert 0 <= one["miou"] <= 100
        assert list(one["iou"]) == list(one["test"]["iou"]) == list(NAMES)
        assert one["minutes"] > 0
        assert all(len(times) == 1 and times[0] > 0 for times in one["milliseconds"].values())
        assert one["gmacs"] > 0
    assert content["networks"]["pem"]["miou"] != content["networks"]["pem"]["test"]["miou"]
    # Started again, it reads everything, latency included.
    before = (root.parent / "out" / "camvid.json").read_bytes()
    in_this_process.clear()
    assert main(arguments(root, *given)) == 0
    assert in_this_process == []
    assert (root.parent / "out" / "camvid.json").read_bytes() == before


SCRIPT = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path(sys.argv[1], "saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "started").touch()
if sys.argv[2] == "wait":
    time.sleep(600)
sys.exit(int(sys.argv[2]))
"""
RUN = """
import sys
from pem_lightning.processes import stop_in_order
from scripts.benchmark.camvid import run_script
with stop_in_order():
    run_script(*sys.argv[1:])
"""


@pytest.mark.slow
def test_a_script_that_fails_is_one_line(tmp_path):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    camvid.run_script(str(script), str(tmp_path), "0")
    with pytest.raises(UserError, match=r"script\.py has failed \(exit code 3\), see above"):
        camvid.run_script(str(script), str(tmp_path), "3")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_saves_or_ends_with_the_benchmark(tmp_path, number):
    (script := tmp_path / "script.py").write_text(SCRIPT)
    child = subprocess.Popen([sys.executable, "-c", RUN, str(script), str(tmp_path), "wait"], cwd=ROOT)
    try:
        wait_for(lambda: (tmp_path / "started").exists())
    finally:
        child.send_signal(number)
        code = child.wait()
    if number == signal.SIGTERM:
        assert code == 128 + number
        assert (tmp_path / "saved").exists()  # before the benchmark ended
    running = ["pgrep", "-f", str(script)]
    wait_for(lambda: subprocess.run(running, capture_output=True).returncode == 1)


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_mistakes_end_in_one_line(library, root, monkeypatch, capsys):
    assert main(["camvid", "--root", str(root)]) == 2
    assert "camvid needs --output FOLDER" in capsys.readouterr().err
    assert main(["camvid", "--root", str(root), "--output", str(root.parent / "out"), "--images", "3"]) == 2
    assert "make no step of 4: raise them or lower --batch" in capsys.readouterr().err
    assert main(arguments(root.parent / "nowhere")) == 2
    assert "error: " in (error := capsys.readouterr().err)
    assert "Traceback" not in error
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    assert main(arguments(root)) == 2
    error = capsys.readouterr().err
    assert "need segmentation_models_pytorch: python -m pip install -r requirements-bench.txt" in error


def test_signals_are_obeyed_between_two_steps(library, root, tmp_path):
    cfg = camvid_baselines.compose_experiment(experiment(root))
    training, signals = Training("fpn", cfg), StopSignals()
    signals.received = signal.SIGINT
    with pytest.raises(Interrupted):
        camvid_baselines.run_steps("fpn", training, cfg, tmp_path / "last.pt", signals)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["step"] == training.step == 1


@needs_library
@torch.no_grad()
def test_the_encoders_features_are_ours_on_imagenets_weights():
    state = {k.removeprefix("backbone."): v for k, v in read_weights("efficientnet_lite0").state.items()}
    ours = build_backbone("efficientnet_lite0")
    ours.load_state_dict(state)
    theirs = EncoderDecoder("fpn", 11, "efficientnet_lite0").eval()
    y, x, channel = np.ogrid[:64, :96, :3]
    image = torch.from_numpy(((7 * y + 13 * x + 29 * channel + x * y) % 256).astype(np.uint8)).permute(2, 0, 1)
    images = normalize(image)[None]
    expected = ours.eval()(images)
    found = theirs.features(images)[-4:]
    for feature, other in zip(found, expected, strict=True):
        torch.testing.assert_close(feature, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@needs_library
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_networks_learn(root, name):
    cfg = camvid_baselines.compose_experiment(experiment(root))
    training = Training(name, cfg)
    before = {key: p.detach().clone() for key, p in training.network.named_parameters()}
    images, classes = next(camvid_baselines.training_batches(cfg))
    assert float(training.learn(images, classes)) > 0
    still = [key for key, p in training.network.named_parameters() if torch.equal(before[key], p)]
    assert still == []
    logits = training.network.eval()(torch.randn(1, 3, 36, 50))
    assert logits.shape == (1, 11, 36, 50)
    assert count_gmacs(training.network, 36, 50) == count_gmacs(training.network, 64, 64)


@needs_library
@torch.no_grad()
def test_the_fast_path_of_a_baseline_is_fused_and_exact():
    network = EncoderDecoder("fpn", 11, "efficientnet_lite0").eval()
    fused, images = camvid.fuse(network), torch.randn(1, 3, 64, 96)
    kinds = {type(module).__name__ for module in fused.backbone.modules()}
    assert not {kind for kind in kinds if "Norm" in kind}
    expected = network(images)
    torch.testing.assert_close(fused(images), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
