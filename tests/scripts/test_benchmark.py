import argparse
import gc
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning import build_pem
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.data import CITYSCAPES
from pem_lightning.models.deformable_conv import DeformableConv
from pem_lightning.types import UserError
from scripts.benchmark import baselines, common, compare, inference, training
from scripts.benchmark.__main__ import main
from scripts.benchmark.training import Step, shared_draws

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
SMALL = ("--backbones", "stdc1", "--size", "64x96", "--device", "cpu", "--rounds", "1", "--warmup", "0")
SHAPE = {"size": (64, 96), "batch": 2, "device": "cpu"}
TRAINING = argparse.Namespace(**SHAPE, segments=4, num_points=64)
INFERENCE = argparse.Namespace(**SHAPE, checkpoint=None, image=None, compile=None)


@pytest.fixture(autouse=True)
def _built_once(monkeypatch):
    """Random networks take a second each."""
    monkeypatch.setattr(common, "random_network", training.random_network)


def test_tasks_take_turns_and_none_is_always_first():
    order = []
    tasks = {name: lambda _, name=name: order.append((name, gc.isenabled())) for name in "abc"}
    times = common.time_in_turns(tasks, rounds=2, warmup=1)
    assert "".join(name for name, _ in order) == "abc" + "bca" + "cab"
    assert not any(enabled for _, enabled in order)
    assert gc.isenabled()
    assert {name: len(one["total"]) for name, one in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_stages_add_up():
    def task(lap):
        time.sleep(0.01)
        lap("first")
        for _ in range(2):
            time.sleep(0.002)
            lap("second")

    found = common.time_once(task, "cpu")
    assert list(found) == ["first", "second", "total"]
    assert found["first"] >= 0.01
    assert found["second"] >= 0.004
    assert found["total"] == pytest.approx(found["first"] + found["second"], abs=1e-3)


def test_ratios_are_taken_within_a_round():
    assert common.ratios({"total": [8.0, 2.0, 4.0]}, {"total": [4.0, 1.0, 2.0]}) == [2, 2, 2]
    assert common.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == "3 (2 to 4)"


def test_memory_is_that_of_a_fresh_process():
    assert float(common.added_memory(torch.ones, 64, 2**18)) == pytest.approx(64, abs=16)


def test_random_weights_behave_like_trained_ones():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    network = common.random_network("stdc1")
    training.random_network.cache_clear()
    again = common.random_network("stdc1").state_dict()
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, again[name]) for name, a in network.state_dict().items())
    assert not network.training
    images = inference.load_images(INFERENCE)
    with torch.no_grad():
        assert all(0.1 < float(f.std()) < 10 for f in network.backbone(images))
        assert 1 < float(network(images).mask_logits.abs().max()) < 1000
    offsets = [m.offset.weight for m in network.modules() if isinstance(m, DeformableConv)]
    assert all(w.abs().min() > 0 for w in offsets)


def test_the_threshold_keeps_queries():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    for few, expected in ((logits, common.KEPT_QUERIES), (logits[:9], int((logits[:9].argmax(-1) != 5).sum()))):
        scores, labels = few.softmax(-1).max(-1)
        assert int(((labels != 5) & (scores > common.choose_threshold(few))).sum()) == expected
    assert common.choose_threshold(torch.tensor([[0.0, 9.0]])) == 0


def test_differences_are_counted_by_class():
    maps = inference.Maps(torch.tensor([[0, 1]]), torch.tensor([[0, 2]], dtype=torch.int32), [7, 11])
    assert inference.panoptic_classes(maps).tolist() == [[-1, 11]]
    others = inference.Maps(torch.tensor([[0, 2]]), torch.tensor([[0, 1]], dtype=torch.int32), [11])
    logits = torch.ones(1, 1, 2), torch.ones(1, 1, 1, 2)
    found = inference.difference((logits, [maps]), ((logits[0] * 2, logits[1]), [others]))
    assert found == ["1 (50 %)", "0 (0 %)", "1.0e+00 of 2.0", "0.0e+00 of 1.0"]


def test_both_steps_learn_by_the_recipe():
    recipe = training.paper_config().recipe
    steps = [Step("stdc1", "float32", path, TRAINING) for path in ("reference", "ours")]
    rates = []
    for step in steps:
        names = {parameter: name for name, parameter in step.network.named_parameters()}
        before = {name: p.detach().clone() for p, name in names.items()}
        rates.append({names[p]: (g["lr"], g["weight_decay"]) for g in step.optimizer.param_groups for p in g["params"]})
        laps = []
        step.run(training.draw_batch(TRAINING), laps.append)
        assert tuple(laps) == training.STAGES
        assert not any(torch.equal(before[name], p) for p, name in names.items())
    assert rates[0] == rates[1]
    assert max(rates[0].values()) == (recipe.optimizer.lr, recipe.parameter_groups.weight_decay)


def test_segments_fill_the_image():
    _, targets = training.draw_batch(TRAINING)
    assert [target.masks.shape for target in targets] == [(4, 64, 96)] * 2
    assert all(target.masks.sum(0).eq(1).all() for target in targets)


def test_rows_are_the_same_in_whatever_order_they_are_drawn():
    by_image, at_once = shared_draws(), shared_draws()
    parts = []
    for _ in range(2):  # layers
        points = [by_image((1, 8, 2), CPU) for _ in range(3)]
        parts.append((torch.cat(points), by_image((4, 24, 2), CPU)))
    assert torch.equal(at_once((2, 3, 8, 2), CPU), torch.stack([points for points, _ in parts]))
    assert torch.equal(at_once((8, 24, 2), CPU), torch.cat([rows for _, rows in parts]))
    assert shared_draws()((0, 8, 2), CPU).shape == (0, 8, 2)


def test_what_computes_something_else_is_not_timed(monkeypatch):
    class FakeStep:
        def __init__(self, backbone, precision, path, options, rand):
            self.network = torch.nn.Linear(1, 1, bias=False)
            self.factor = 1.0 if path == "reference" else 1.1

        def forward(self, batch):
            loss = self.factor + 0 * self.network.weight.sum()
            return {"loss": loss}, loss

    monkeypatch.setattr(training, "Step", FakeStep)
    with pytest.raises(UserError, match=r"our losses of stdc1 differ from the reference's by 10.0%"):
        training.compare("stdc1", None, TRAINING)


def test_differences_are_relative():
    expected = {"a": torch.tensor(2.0), "b": torch.tensor(2.0)}, {"w": torch.tensor([3.0, 4.0]), "v": torch.zeros(1)}
    actual = {"a": torch.tensor(2.1), "b": torch.tensor(1.9)}, {"w": torch.tensor([4.0, 3.0]), "v": torch.zeros(1)}
    assert training.difference(actual, expected) == pytest.approx((0, 0.05, 2**0.5 / 5), abs=1e-6)
    assert training.difference((expected[0], {"w": expected[1]["w"]}), expected)[2] == float("inf")


@pytest.mark.slow
def test_inference_is_reported(tmp_path, capsys):
    arguments = ["inference", *SMALL, "--no-memory", "--output", str(tmp_path)]
    assert main(arguments) == 0
    report = (tmp_path / "inference.md").read_text()
    assert report in capsys.readouterr().out
    assert report.startswith("`python -m scripts.benchmark inference --backbones stdc1")
    first = [line.split(" | ")[0] for line in report.splitlines() if line.startswith("| stdc1")]
    paths = ["| stdc1 reference", "| stdc1 float32"]
    assert first == [*paths, "| stdc1 reference, other convolutions", *paths[1:]]
    with Image.open(tmp_path / "inference.png") as picture:
        assert picture.width > 800


@pytest.mark.slow
def test_training_is_reported(capsys):
    arguments = ["training", *SMALL, "--segments", "4", "--num-points", "64"]
    assert main([*arguments, "--no-memory"]) == 0
    report = capsys.readouterr().out
    start = [line for line in report.splitlines() if line.startswith("| stdc1")]
    assert [line.split(" | ")[0] for line in start][:2] == ["| stdc1 float32 reference", "| stdc1 float32 ours"]
    ours = start[3].split(" | ")
    assert ours[0] == "| stdc1 ours"
    assert float(ours[1]) < 1e-5
    assert float(ours[3].rstrip(" |")) < 0.1  # a prototype that rounding moved shows


def test_kernels_and_data_are_reported(capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert main(["kernels", "--size", "64x64", "--rounds", "1"]) == 0
    assert main(["data", "--size", "64x128", "--images", "4", "--workers", "0", "--rounds", "1"]) == 0
    report = capsys.readouterr().out
    assert "| convolution 2x2 | grid_sample |" in report
    assert "| cache, whole augmentation |" in report


def test_a_checkpoint_and_a_photograph(tmp_path, capsys):
    settings = {"backbone": "stdc1", "num_queries": 10, "num_layers": 1}
    network = build_pem(**settings, num_classes=CITYSCAPES.num_classes)
    thresholds = {"resize_first": True, "object_mask_threshold": 0.05, "overlap_threshold": 0.1}
    config = {"network": {"_target_": "pem_lightning.build_pem", **settings}, "task": {"inference": thresholds}}
    ours = {"config": config, "overrides": [], "dataset_info": CITYSCAPES.to_dict()}
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"global_step": 7, CHECKPOINT_KEY: ours, "state_dict": state}, tmp_path / "last.ckpt")
    Image.fromarray(np.full((40, 60, 3), 120, np.uint8)).save(tmp_path / "photo.png")
    given = ["--checkpoint", str(tmp_path / "last.ckpt"), "--image", str(tmp_path / "photo.png"), "--no-memory"]
    assert main(["inference", *SMALL[2:], *given]) == 0
    assert "| last float32 |" in capsys.readouterr().out


@pytest.mark.slow
def test_another_checkout_is_timed_in_turns(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "BACKBONES", ("stdc1",))
    shutil.copytree(ROOT / "pem_lightning", tmp_path / "pem_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    options = ("--size", "64x64", "--training-size", "64x64", "--rounds", "1", "--precisions", "bfloat16")
    assert main(["compare", str(tmp_path), *options]) == 0
    rows = [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("| yes |")]
    assert rows == ["| inference stdc1 bfloat16", "| training stdc1", "| loader"]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no checkout of this project")
    assert main(["training", *SMALL, "--batch", "1"]) == 2
    assert capsys.readouterr().err == "error: --batch 1: training needs 2 or more, for normalisation over the batch\n"
    for wrong in (["--size", "1024"], ["--rounds", "0"], ["--backbones", "resnet99"]):
        with pytest.raises(SystemExit, match="2"):
            main(["inference", *wrong])


def test_it_starts_from_its_folder(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark", "--help"])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "scripts" / "benchmark"), run_name="__main__")
    assert (
        "{inference,training,data,kernels,compare,runtimes,soak,efficiency,readout,camvid}" in capsys.readouterr().out
    )


def test_a_missing_library_is_named_with_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: .*requirements-bench.txt"):
        baselines.build_baseline("segformer_b0", "float32", (64, 96), "cpu")


@pytest.mark.parametrize("name", ["segformer_b0", "eomt_small", "mask2former_r50"])
def test_baselines_make_maps_of_the_images_size(name):
    pytest.importorskip("transformers", reason="baselines need transformers (requirements-bench.txt)")
    baseline = baselines.build_baseline(name, "float32", (64, 96), "cpu")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = baseline.postprocess(baseline.predict(images), (64, 96))
    assert [m.shape for m in maps[:2]] == [(64, 96)] * 2
    assert baseline.gmacs(images) > 0.1
    if name == "mask2former_r50":
        assert [m["segmentation"].shape for m in maps[2:]] == [(64, 96)] * 2
        assert sum(p.numel() for p in baseline.network.parameters()) / 1e6 == pytest.approx(44.0, abs=0.1)


def test_eomt_looks_at_overlapping_windows():
    pytest.importorskip("transformers", reason="baselines need transformers (requirements-bench.txt)")
    baseline = baselines.build_baseline("eomt_small", "float32", (32, 80), "cpu")
    assert baseline.starts == [0, 24, 48]
    with pytest.raises(UserError, match="multiple of 16, not 90"):
        baselines.build_baseline("eomt_small", "float32", (90, 150), "cpu")
