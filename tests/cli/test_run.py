"""The jobs from the command line, end to end, on a tiny drawn data set."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.callbacks.visualization import read_metrics
from pem_lightning.checkpoints import convert_weights, read_checkpoint
from pem_lightning.files import rgb_to_id
from pem_lightning.inference.predictor import Predictor
from pem_lightning.training.module import PEMModule
from tests.jobs import DRAWN, ROOT, TINIEST, TINY, call, in_child

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(work):
    """Folder of a finished run of four steps."""
    limits = ("recipe.max_steps=4", "recipe.val_interval=2", "recipe.checkpoint_interval=1")
    assert call("train", *TINY, *limits, "hydra.run.dir=trained") == 0
    return work / "trained"


@pytest.fixture(scope="module")
def last(trained):
    return f"checkpoint={trained}/checkpoints/last.ckpt"


def metrics_of(folder):
    return json.loads(Path(folder, "metrics.json").read_text())


def test_training_leaves_everything_behind(trained):
    for name in ("checkpoints/best.ckpt", "curves.png", "per_class.csv", "run.log", ".hydra/overrides.yaml"):
        assert (trained / name).is_file(), name
    assert len(list((trained / "panels").glob("step_000004_*.png"))) == 3
    metrics = metrics_of(trained)
    assert metrics["step"] == 4
    assert {"val/PQ", "val/SQ_things", "val/RQ_stuff", "val/mIoU"} <= metrics.keys()
    assert len(metrics["per_class"]) == 19
    with (trained / "csv" / "metrics.csv").open() as file:
        assert {"train/loss", "train/loss_dice_1", "val/PQ"} <= set(next(csv.reader(file)))
    checkpoint = read_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert checkpoint.step == checkpoint.config["recipe"]["max_steps"] == 4
    assert checkpoint.config["network"]["num_queries"] == 20
    assert checkpoint.info.num_classes == 19
    assert "network.num_layers=2" in checkpoint.overrides


def test_evaluation_repeats_the_runs_numbers_to_the_last_digit(trained, last):
    """Also in two processes, of which one has two of the three images, and with their files."""
    assert call("evaluate", last, "hydra.run.dir=one/run", "save_predictions=one/saved") == 0
    original, repeated = metrics_of(trained), metrics_of("one/run")
    names = [name for name in original if name.startswith("val/")]
    assert repeated["per_class"] == original["per_class"]
    assert {name: repeated[name] for name in names} == {name: original[name] for name in names}
    devices = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu")
    assert in_child(last, *devices, "hydra.run.dir=two/run", "save_predictions=two/saved", job="evaluate") == 0
    for name in names:
        assert metrics_of("two/run")[name] == pytest.approx(original[name], abs=1e-9), name
    same = [path.relative_to("one") for what in ("saved/**/*.*", "run/worst/*") for path in Path("one").glob(what)]
    assert sum("worst" in name.parts for name in same) == 3
    for name in same:
        assert Path("two", name).read_bytes() == Path("one", name).read_bytes(), name


def test_an_ablation_evaluates_and_predicts_from_its_checkpoint_alone(work):
    variant = ["ablation=[masked_cross_attention,msdeform,no_deep_supervision]", "decoder_layers=1"]
    tiny = [key for key in TINY if not key.startswith("network.num_layers")]
    assert call("train", *tiny, *variant, "recipe.max_steps=1", "recipe.val_interval=1", "hydra.run.dir=cut") == 0
    checkpoint = f"checkpoint={work}/cut/checkpoints/best.ckpt"
    assert call("evaluate", checkpoint, "trainer=cpu", "hydra.run.dir=cut_again") == 0
    assert metrics_of("cut")["val/PQ"] == metrics_of("cut_again")["val/PQ"]
    image = next(Path("drawn").rglob("*_leftImg8bit.png"))
    assert call("predict", checkpoint, f"input={image}", "output=cut_predicted", "hydra.run.dir=cut_log") == 0
    assert list(Path("cut_predicted").rglob("*.png"))
    names = read_checkpoint(work / "cut" / "checkpoints" / "best.ckpt").network
    assert not any(name.startswith("transformer_decoder.layers.1.") for name in names)


def test_a_panoptic_checkpoint_is_evaluated_as_other_tasks(last):
    arguments = ("trainer=cpu", "task=semantic", "inference.flip=true", "hydra.run.dir=as_semantic")
    assert call("evaluate", last, *arguments) == 0
    metrics = metrics_of("as_semantic")
    assert "val/mIoU" in metrics
    assert "val/PQ" not in metrics
    arguments = ("trainer=cpu", "task=instance", "save_predictions=saved", "hydra.run.dir=as_instance")
    assert call("evaluate", last, *arguments) == 0
    metrics = metrics_of("as_instance")
    assert {"val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl"} <= metrics.keys()
    assert len(metrics["per_class"]) == 8
    assert not Path("as_instance/confusion.png").exists()
    results = json.loads(Path("saved/instances.json").read_text())
    assert {r["category_id"] for r in results} <= {24, 25, 26, 27, 28, 31, 32, 33}


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_tiles(last, tmp_path, capsys, task):
    """One tile that covers the image changes no digit; smaller ones work, impossible ones are refused."""
    arguments = ("trainer=cpu", f"task={task}")
    assert call("evaluate", last, *arguments, f"hydra.run.dir=whole_{task}") == 0
    one = ("inference.tile=[1024,2048]", f"hydra.run.dir=one_tile_{task}")
    assert call("evaluate", last, *arguments, *one) == 0
    whole, covered = metrics_of(f"whole_{task}"), metrics_of(f"one_tile_{task}")
    for name in (name for name in whole if name.startswith("val/")):
        assert covered[name] == pytest.approx(whole[name], abs=0, nan_ok=True), name
    tiles = ("inference.tile=[64,64]", "inference.overlap=16")
    assert call("evaluate", last, *arguments, *tiles, f"hydra.run.dir=tiles_{task}") == 0
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 150, 3), np.uint8)).save(photo)
    assert call("predict", last, f"input={photo}", f"output={tmp_path}/out", f"task={task}", *tiles) == 0
    assert Image.open(next(Path(tmp_path, "out").glob("*_overlay.png"))).size == (150, 90)
    capsys.readouterr()
    assert call("predict", last, f"input={photo}", f"output={tmp_path}/out", *tiles, "inference.overlap=64") == 2
    assert "inference.overlap=64: give a number of pixels from 0 to 63" in capsys.readouterr().err


def test_prediction_of_any_image(last, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (45, 70, 3), np.uint8)).save(folder / "wide.jpg")
    Image.fromarray(rng.integers(0, 256, (90, 33), np.uint8)).save(folder / "tall_grey.png")
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert call("predict", last, f"input={folder}", f"output={out}") == 2
    printed = capsys.readouterr()
    assert "broken.png" in printed.err
    assert "1 of 3 files could not be read" in printed.err
    content = json.loads((out / "panoptic.json").read_text())
    assert {a["image_id"] for a in content["annotations"]} == {"wide", "tall_grey"}
    for annotation in content["annotations"]:
        ids = rgb_to_id(np.array(Image.open(out / "panoptic" / annotation["file_name"])))
        assert {s["id"] for s in annotation["segments_info"]} == set(np.unique(ids).tolist()) - {0}
    assert Image.open(out / "wide_overlay.png").size == (70, 45)
    assert Image.open(out / "tall_grey_overlay.png").size == (33, 90)


@pytest.mark.parametrize("task", ["semantic", "instance"])
def test_prediction_of_other_tasks(last, tmp_path, task):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    flip = str(task == "semantic").lower()
    assert (
        call("predict", last, f"input={photo}", f"output={tmp_path}/out", f"task={task}", f"inference.flip={flip}") == 0
    )
    if task == "semantic":
        assert Image.open(tmp_path / "out" / "photo_semantic.png").size == (50, 40)
    else:
        assert isinstance(json.loads((tmp_path / "out" / "photo_instances.json").read_text()), list)


def test_a_run_is_resumed_in_its_own_folder(trained):
    """With more steps: steps, schedule and curves go on, and the earlier log is not lost."""
    shutil.copytree(trained, "chain/first")
    limits = ("recipe.max_steps=6", "recipe.val_interval=2", "recipe.checkpoint_interval=1")
    assert call("train", *limits, "trainer=cpu", "resume=chain/first/checkpoints/last.ckpt") == 0
    assert metrics_of("chain/first")["step"] == 6
    logs = [Path("chain/first/csv") / name for name in ("metrics_before_step_0000004.csv", "metrics.csv")]
    steps = [step for step, _ in read_metrics(logs)["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert read_checkpoint("chain/first/checkpoints/last.ckpt").step == 6


def test_a_finished_run_has_nothing_to_resume(trained, capsys):
    arguments = [f"hydra.run.dir={trained}", "resume=auto"]
    assert call("train", *arguments) == 0
    assert "step 4 of 4 already: nothing to do" in capsys.readouterr().out


def test_training_starts_from_the_weights_of_another_run(trained):
    """Almost without learning they stay what they were; steps count anew."""
    weights = f"weights={trained}/checkpoints/best.ckpt"
    limits = ("recipe.max_steps=1", "recipe.val_interval=1", "recipe.checkpoint_interval=1", "backbone.norm=frozen")
    assert call("train", *TINY, *limits, "recipe.optimizer.lr=1e-30", weights, "hydra.run.dir=from_weights") == 0
    source = read_checkpoint(trained / "checkpoints" / "best.ckpt").network
    checkpoint = read_checkpoint("from_weights/checkpoints/last.ckpt")
    assert checkpoint.step == 1
    names = [name for name in source if name.startswith("backbone.") and name.endswith((".weight", ".bias"))]
    assert all(torch.equal(checkpoint.network[name], source[name]) for name in names)
    log = Path("from_weights/run.log").read_text()
    assert f"weights from {trained}/checkpoints/best.ckpt (PEM-Lightning, step" in log
    assert "frozen batch normalisation" not in log


def test_training_for_instances(work):
    """With a backbone that people use."""
    tiny = [key for key in TINY if not key.startswith("backbone.")]
    arguments = ("task=instance", "recipe.max_steps=1", "recipe.val_interval=1", "backbone=resnet18")
    assert call("train", *tiny, *arguments, "hydra.run.dir=instance") == 0
    metrics = metrics_of("instance")
    assert "val/AP" in metrics
    assert "val/PQ" not in metrics


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["dataset=cityscapes", "trainer=cpu"], "leftImg8bit_trainvaltest.zip"),
        ("train", ["recipe.max_step=3"], "did you mean recipe.max_steps?"),
        ("train", ["seed=0,1"], "add --multirun"),
        ("train", ["resume=nothing.ckpt"], "nothing.ckpt does not exist"),
        ("train", ["resume=last", "hydra.run.dir=lonely/run"], "start without resume"),
        ("train", ["resume={trained}/checkpoints/last.ckpt"], "raise recipe.max_steps to train on"),
        ("train", ["weights=a.pth", "resume={trained}/checkpoints/last.ckpt"], "leave one of them out"),
        ("train", ["weights=a.pth", "backbone=timm", "backbone.pretrained=true"], "leave one of them out"),
        ("train", ["hydra.run.dir={trained}/run.log/run"], "choose another output folder"),
        ("train", [*TINY, "trainer=gpu"], "choose trainer=cpu or trainer=auto"),
        ("train", [*TINY, "trainer.precision=17"], "trainer: Precision 17 is invalid. Allowed precision values"),
        ("train", [*TINY, "recipe.global_batch_size=9"], "9"),
        ("train", [*TINY, "recipe.global_batch_size=1"], "nearest that can: recipe.global_batch_size=2"),
        ("train", [*TINY, "recipe.compile=fast"], "recipe.compile=fast: choose null"),
        ("train", [*TINY, "weights=gone.pth"], "gone.pth does not exist"),
        ("train", [*TINY, "weights=torchvision/resnet5"], "torchvision/resnet50"),
        ("train", [*DRAWN, "weights={trained}/checkpoints/last.ckpt"], "does not cover the backbone"),
        ("evaluate", [], "or one that ships: camvid"),
        ("evaluate", ["checkpoint=nothing.ckpt"], "nothing.ckpt does not exist"),
        ("evaluate", ["{last}", "network.num_queries=7", "trainer=cpu"], "does not fit"),
        ("predict", ["{last}"], "input"),
        ("predict", ["{last}", "input=nowhere.jpg"], "nowhere.jpg does not exist"),
        ("predict", ["{last}", "input=0", "classes=[cra]"], "car"),
        ("predict", ["{last}", "input=0", "save=mask"], "masks"),
        ("predict", ["{last}", "input=0", "device=cuda:99"], "device=auto"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(trained, last, job, arguments, message, capsys):
    if "trainer=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    capsys.readouterr()
    assert call(job, *(a.replace("{trained}", str(trained)).replace("{last}", last) for a in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


def test_the_experiment_is_shown_with_what_the_checkpoint_brings(work, last, capsys):
    """Also by the entry point itself, in a process of its own; a mistake shows no traceback."""
    before = set(Path("outputs").rglob("evaluate*"))
    assert call("evaluate", "--cfg", "job", last) == 0
    assert "num_layers: 2\n" in capsys.readouterr().out
    assert set(Path("outputs").rglob("evaluate*")) == before
    command = [sys.executable, ROOT / "evaluate.py", "--cfg", "job", "checkpoint=gone.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: checkpoint gone.ckpt does not exist")


@pytest.mark.parametrize("name", ["train", "evaluate", "predict", "export", "app"])
def test_entry_points_are_thin(name):
    assert len((ROOT / f"{name}.py").read_text().splitlines()) < 10


def test_the_papers_recipe_starts(tmp_path, monkeypatch, capsys):
    """On images of Cityscapes' true layout and size: two of them for one step, and a tiny network."""
    rng = np.random.default_rng(0)
    for name in ("train/aachen/aachen_000000_000019", "train/bremen/bremen_000001_000019", "val/ulm/ulm_000000_000294"):
        ids = np.full((1024, 2048), 23, np.uint16)
        ids[500:] = 7
        ids[600:800, 300:900] = 26001
        ids[550:750, 1200:1500] = 24  # a crowd
        ids[:20] = 3
        image = Image.fromarray(rng.integers(0, 256, (64, 128, 3), np.uint8)).resize((2048, 1024))
        for folder, suffix, picture in (("leftImg8bit", "", image), ("gtFine", "_gtFine_instanceIds", None)):
            path = tmp_path / folder / f"{name}{suffix or '_leftImg8bit'}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            (picture or Image.fromarray(ids)).save(path)
    monkeypatch.chdir(tmp_path)
    small = ("recipe.global_batch_size=2", "trainer.max_steps=1", "recipe.val_interval=1", "dataset.num_workers=0")
    sizes = [key for key in TINY if key.startswith(("backbone.", "network."))]
    network = (*sizes, "network.num_layers=1", "trainer=cpu")
    assert call("train", "dataset=cityscapes", "dataset.root=.", *small, *network, "hydra.run.dir=run") == 0
    printed = capsys.readouterr().out
    assert "mIoU" in printed
    assert "PQ" in printed
    assert Path("run/checkpoints/best.ckpt").exists()


def test_names_of_files_may_have_any_characters(trained, work, capsys):
    """Those of checkpoints, images and folders; and a sweep and a list still are what they were."""
    folder = work / "odd = (1) [x], {y} ü"
    folder.mkdir()
    checkpoints = [shutil.copy(trained / "checkpoints/last.ckpt", folder / f"step={n}.ckpt") for n in (1, 2)]
    photos = [folder / "photo (1)#'.png", folder / "b.png"]
    for photo in photos:
        Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(photo)
    relative = folder.name  # as it is typed
    checkpoint = f"checkpoint={relative}/step=1.ckpt"
    assert call("predict", checkpoint, f"input={relative}/{photos[0].name}", f"output={relative}/one") == 0
    assert (folder / "one" / f"{photos[0].stem}_overlay.png").is_file()
    os.chdir(folder)
    names = f"input=[{photos[0].name},{photos[1].name}]"
    assert call("predict", f"checkpoint={checkpoints[0]}", names, "output=both", "save=overlays") == 0
    assert len(list((folder / "both").glob("*_overlay.png"))) == 2
    capsys.readouterr()
    root = f"dataset.root={work}/drawn"
    swept = ("-m", "checkpoint=step=1.ckpt,step=2.ckpt", root, "trainer=cpu", f"hydra.sweep.dir={folder}/sweep")
    try:
        assert call("evaluate", *swept) == 0
    finally:
        os.chdir(work)
    assert len(list((folder / "sweep").glob("*/metrics.json"))) == 2


def test_the_last_weights_are_validated_and_the_best_checkpoint_may_be_slim(work, capsys):
    """Wherever the interval of validations stands; and what a validation is of is in its numbers."""
    keys = ("recipe.max_steps=3", "recipe.val_interval=2", "callbacks.best.save_weights_only=true")
    assert call("train", *TINIEST, *keys, "hydra.run.dir=end") == 0
    assert [step for step, _ in read_metrics([work / "end/csv/metrics.csv"])["val/PQ"]] == [2, 3]
    assert metrics_of("end")["step"] == 3
    assert call("train", *TINIEST, *keys, "recipe.val_interval=100", "hydra.run.dir=end") == 0
    best, last = (work / "end" / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    assert best.stat().st_size < 0.5 * last.stat().st_size
    original = metrics_of("end")
    assert original["step"] == 3
    assert call("train", f"resume={best}") == 2
    assert "trained to step 3 of 3" in capsys.readouterr().err
    assert call("train", f"resume={best}", "recipe.max_steps=4") == 2
    assert "has nothing but weights" in capsys.readouterr().err
    convert_weights(last, work / "slim.pth")
    for path in (best, "slim.pth"):
        assert call("evaluate", f"checkpoint={path}", "hydra.run.dir=evaluated") == 0
        assert metrics_of("evaluated") == original
    assert Predictor("slim.pth")(np.zeros((32, 64, 3), np.uint8)).image.shape == (32, 64, 3)


@pytest.mark.parametrize("limit", ["+trainer.overfit_batches=1", "debug=overfit", "+trainer.limit_train_batches=1"])
def test_one_batch_is_seen_at_every_step(work, monkeypatch, limit):
    seen, step = [], PEMModule.training_step
    monkeypatch.setattr(PEMModule, "training_step", lambda self, b, i: (seen.append(b.names), step(self, b, i))[1])
    assert call("train", *TINIEST, limit, "recipe.max_steps=3", "hydra.run.dir=overfit") == 0
    assert seen == [seen[0]] * 3
    assert metrics_of("overfit")["step"] == 3


def test_a_fast_run_and_a_profile(work):
    assert call("train", *TINIEST, "debug=fast", "hydra.run.dir=fast") == 0
    assert call("train", *TINIEST, "debug=profile", "recipe.max_steps=2", "hydra.run.dir=profile") == 0
    assert "training_step" in (work / "profile" / "fit-profile.txt").read_text()


def test_a_closed_pipe_leaves_no_traceback():
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, str(ROOT / "train.py"), "--help"], stdout=pipe, stderr=pipe)
    child.stdout.close()  # as `| head` does when it has seen enough
    assert child.stderr.read() == b""
    assert child.wait() == 128 + 13
