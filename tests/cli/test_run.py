"""The three jobs from the command line, end to end, on a tiny drawn data set."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pem_lightning.callbacks.visualization import read_metrics
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.files import rgb_to_id
from tests.jobs import TINY, call

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with drawn images; jobs run inside it."""
    folder = tmp_path_factory.mktemp("run")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def trained(work):
    """Folder of a finished run of four steps."""
    code = call(
        "train",
        *TINY,
        "recipe.max_steps=4",
        "recipe.val_interval=2",
        "recipe.checkpoint_interval=1",
        "hydra.run.dir=trained",
    )
    assert code == 0
    return work / "trained"


def last_metrics(folder, prefix="val/"):
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/mIoU"]]
    return {name: value for name, value in rows[-1].items() if name.startswith(prefix)}


def test_training_leaves_everything_behind(trained):
    for name in ("best.ckpt", "last.ckpt"):
        assert (trained / "checkpoints" / name).is_file(), name
    for name in ("curves.png", "metrics.json", "per_class.csv", "csv/metrics.csv"):
        assert (trained / name).is_file(), name
    assert len(list((trained / "panels").glob("step_000004_*.png"))) == 3
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["step"] == 4
    assert {"val/PQ", "val/SQ_things", "val/RQ_stuff", "val/mIoU"} <= metrics.keys()
    assert len(metrics["per_class"]) == 19
    with (trained / "csv" / "metrics.csv").open() as file:
        assert {"train/loss", "train/loss_dice_1", "val/PQ"} <= set(next(csv.reader(file)))


def test_a_checkpoint_knows_its_experiment(trained):
    checkpoint = read_checkpoint(trained / "checkpoints" / "last.ckpt")
    assert checkpoint.step == 4
    assert checkpoint.config["network"]["num_queries"] == 20
    assert checkpoint.config["recipe"]["max_steps"] == 4
    assert checkpoint.info.num_classes == 19
    assert "network.num_layers=2" in checkpoint.overrides


def test_evaluation_repeats_the_runs_numbers_to_the_last_digit(trained):
    assert call("evaluate", f"checkpoint={trained}/checkpoints/last.ckpt", "hydra.run.dir=evaluated") == 0
    repeated = json.loads(Path("evaluated/metrics.json").read_text())
    original = json.loads((trained / "metrics.json").read_text())
    assert repeated["per_class"] == original["per_class"]
    names = [name for name in original if name.startswith("val/")]
    assert {name: repeated[name] for name in names} == {name: original[name] for name in names}


def test_an_ablation_evaluates_and_predicts_from_its_checkpoint_alone(work):
    variant = ["ablation=[masked_cross_attention,msdeform,no_deep_supervision]", "decoder_layers=1"]
    tiny = [key for key in TINY if not key.startswith("network.num_layers")]
    assert call("train", *tiny, *variant, "recipe.max_steps=2", "recipe.val_interval=2", "hydra.run.dir=cut") == 0
    checkpoint = f"checkpoint={work}/cut/checkpoints/best.ckpt"
    assert call("evaluate", checkpoint, "hydra.run.dir=cut_again") == 0
    first, again = (json.loads(Path(run, "metrics.json").read_text()) for run in ("cut", "cut_again"))
    assert first["val/PQ"] == again["val/PQ"]
    image = next(Path("drawn").rglob("*_leftImg8bit.png"))
    assert call("predict", checkpoint, f"input={image}", "output=cut_predicted", "hydra.run.dir=cut_log") == 0
    assert list(Path("cut_predicted").rglob("*.png"))
    names = read_checkpoint(work / "cut" / "checkpoints" / "best.ckpt").network
    assert not any(name.startswith("transformer_decoder.layers.1.") for name in names)


def test_evaluation_takes_overrides(trained, capsys):
    code = call(
        "evaluate", f"checkpoint={trained}/checkpoints/last.ckpt", "task=semantic", "hydra.run.dir=evaluated_semantic"
    )
    assert code == 0
    metrics = json.loads(Path("evaluated_semantic/metrics.json").read_text())
    assert "val/mIoU" in metrics
    assert "val/PQ" not in metrics


def test_a_panoptic_checkpoint_is_evaluated_as_instances(trained):
    arguments = ("task=instance", "save_predictions=saved", "hydra.run.dir=evaluated_instance")
    assert call("evaluate", f"checkpoint={trained}/checkpoints/last.ckpt", *arguments) == 0
    metrics = json.loads(Path("evaluated_instance/metrics.json").read_text())
    assert {"val/AP", "val/AP50", "val/AP75", "val/APs", "val/APm", "val/APl"} <= metrics.keys()
    assert len(metrics["per_class"]) == 8
    assert not Path("evaluated_instance/confusion.png").exists()
    results = json.loads(Path("saved/instances.json").read_text())
    assert {r["category_id"] for r in results} <= {24, 25, 26, 27, 28, 31, 32, 33}


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_two_processes_evaluate_like_one(trained, task):
    """Numbers, worst images and predictions, with test-time augmentation; one process has two of the three images."""
    arguments = [f"checkpoint={trained}/checkpoints/last.ckpt", f"task={task}", "inference.flip=true"]
    for processes in (1, 2):
        own = [f"hydra.run.dir={task}_by{processes}/run", f"save_predictions={task}_by{processes}/saved"]
        devices = [f"trainer.devices={processes}", "trainer.strategy=ddp"] if processes > 1 else []
        process = start(trained.parent, *arguments, *own, *devices, job="evaluate")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    one, two = (Path(f"{task}_by{processes}") for processes in (1, 2))
    numbers = [json.loads((folder / "run" / "metrics.json").read_text()) for folder in (one, two)]
    assert numbers[0].keys() == numbers[1].keys()
    for name in [name for name in numbers[0] if name.startswith("val/")]:
        assert numbers[1][name] == pytest.approx(numbers[0][name], abs=1e-9), name
    same = [path.relative_to(one) for what in ("saved/**/*.*", "run/worst/*") for path in sorted(one.glob(what))]
    assert sum("worst" in name.parts for name in same) == 3
    for name in same:
        assert (two / name).read_bytes() == (one / name).read_bytes(), name
    assert len(list(two.glob("run/worst/*"))) == 3


def test_prediction_of_any_image(trained, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (45, 70, 3), np.uint8)).save(folder / "wide.jpg")
    Image.fromarray(rng.integers(0, 256, (90, 33), np.uint8)).save(folder / "tall_grey.png")
    (folder / "broken.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert call("predict", f"checkpoint={trained}/checkpoints/last.ckpt", f"input={folder}", f"output={out}") == 2
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


@pytest.mark.parametrize(("task", "views"), [("semantic", "flip=true"), ("instance", "scales=[0.5,1]")])
def test_prediction_of_other_tasks(trained, tmp_path, task, views):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(photo)
    arguments = (f"checkpoint={trained}/checkpoints/best.ckpt", f"input={photo}", f"output={tmp_path}/out")
    assert call("predict", *arguments, f"task={task}", f"inference.{views}") == 0
    if task == "semantic":
        assert Image.open(tmp_path / "out" / "photo_semantic.png").size == (50, 40)
    else:
        assert isinstance(json.loads((tmp_path / "out" / "photo_instances.json").read_text()), list)


def test_resume_last_goes_on_in_the_runs_own_folder(trained):
    """Started anew with more steps: steps, schedule and curves go on, and the earlier log is not lost."""
    shutil.copytree(trained, "chain/first")
    where = "hydra.run.dir=chain/unused"  # names the folder in which resume=last looks
    limits = ("recipe.max_steps=6", "recipe.val_interval=2", "recipe.checkpoint_interval=1")
    assert call("train", *TINY, *limits, "resume=chain/first/checkpoints/last.ckpt") == 0
    assert json.loads(Path("chain/first/metrics.json").read_text())["step"] == 6
    logs = [Path("chain/first/csv") / name for name in ("metrics_before_step_0000004.csv", "metrics.csv")]
    steps = [step for step, _ in read_metrics(logs)["train/loss"]]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert read_checkpoint("chain/first/checkpoints/last.ckpt").step == 6
    limits = ("recipe.max_steps=7", "recipe.val_interval=1", "recipe.checkpoint_interval=1")
    assert call("train", *TINY, *limits, "resume=last", where) == 0
    assert json.loads(Path("chain/unused/metrics.json").read_text())["step"] == 7


def test_training_starts_from_the_weights_of_another_run(trained):
    """Almost without learning they stay what they were; steps count anew; the result is used as ever."""
    weights = f"weights={trained}/checkpoints/best.ckpt"
    limits = ("recipe.max_steps=1", "recipe.val_interval=1", "recipe.checkpoint_interval=1", "backbone.norm=frozen")
    assert call("train", *TINY, *limits, "recipe.optimizer.lr=1e-30", weights, "hydra.run.dir=from_weights") == 0
    source = read_checkpoint(trained / "checkpoints" / "best.ckpt").network
    checkpoint = read_checkpoint("from_weights/checkpoints/last.ckpt")
    assert checkpoint.step == 1
    frozen = {k: v for k, v in checkpoint.network.items() if k.startswith("backbone.") and v.is_floating_point()}
    assert all(torch.equal(v, source[k]) for k, v in frozen.items())
    log = Path("from_weights/run.log").read_text()
    assert f"weights from {trained}/checkpoints/best.ckpt (PEM-Lightning, step" in log
    assert "frozen batch normalisation" not in log
    assert call("evaluate", "checkpoint=from_weights/checkpoints/last.ckpt", "hydra.run.dir=from_weights_again") == 0


def test_a_finished_run_is_not_resumed(trained, capsys):
    code = call("train", *TINY, "recipe.max_steps=4", f"resume={trained}/checkpoints/last.ckpt", "hydra.run.dir=again")
    assert code == 2
    assert "raise recipe.max_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("train", ["dataset=cityscapes", "trainer=cpu"], "leftImg8bit_trainvaltest.zip"),
        ("train", ["resume=nothing.ckpt"], "nothing.ckpt does not exist"),
        ("train", [*TINY, "resume=last", "hydra.run.dir=lonely/run"], "start without resume"),
        ("train", [*TINY, "trainer=gpu"], "choose trainer=cpu or trainer=auto"),
        ("train", [*TINY, "recipe.global_batch_size=9"], "9"),
        ("train", [*TINY, "recipe.global_batch_size=1"], "nearest that can: recipe.global_batch_size=2"),
        ("train", [*TINY, "recipe.compile=fast"], "recipe.compile=fast: choose null"),
        ("train", [*TINY, "trainer.precision=17"], "trainer: Precision 17 is invalid. Allowed precision values"),
        ("train", [*TINY, "recipe.ema_decay=2.0"], "recipe.ema_decay=2"),
        ("train", [*TINY, "weights=gone.pth"], "gone.pth does not exist"),
        ("train", [*TINY, "weights=torchvision/resnet5"], "did you mean torchvision/resnet50?"),
        ("train", [*TINY, "weights=a.pth", "resume={trained}/checkpoints/last.ckpt"], "leave one of them out"),
        ("train", [*TINY, "weights=a.pth", "backbone=timm", "backbone.pretrained=true"], "leave one of them out"),
        ("train", [*TINY, "weights={trained}/checkpoints/last.ckpt", "backbone=resnet18"], "choose backbone=stdc1"),
        ("evaluate", [], "checkpoint"),
        ("evaluate", ["checkpoint=nothing.ckpt"], "nothing.ckpt does not exist"),
        ("evaluate", ["checkpoint={trained}/checkpoints/last.ckpt", "network.num_queries=7"], "does not fit"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=nowhere.jpg"], "nowhere.jpg does not exist"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt"], "input"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=gone.mp4"], "gone.mp4 does not exist"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=97"], "there is no camera 97"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=0", "classes=[cra]"], "did you mean car?"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=0", "save=mask"], "did you mean masks?"),
        ("predict", ["checkpoint={trained}/checkpoints/last.ckpt", "input=0", "device=cuda:99"], "device=auto"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(trained, job, arguments, message, capsys):
    if job == "train" and "trainer=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    capsys.readouterr()
    assert call(job, *(a.format(trained=trained) for a in arguments)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.parametrize(("task", "metric"), [("semantic", "val/mIoU"), ("instance", "val/AP")])
def test_training_of_other_tasks(work, task, metric):
    arguments = (*TINY, f"task={task}", "recipe.max_steps=1", "recipe.val_interval=1", "backbone=resnet18")
    assert call("train", *arguments, f"hydra.run.dir={task}") == 0
    metrics = json.loads(Path(f"{task}/metrics.json").read_text())
    assert metric in metrics
    assert "val/PQ" not in metrics


def start(folder, *arguments, job="train"):
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
    command = [sys.executable, str(ROOT / f"{job}.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **pipes)


def test_killed_training_resumes_from_its_last_checkpoint(work):
    limits = ("recipe.max_steps=200", "recipe.val_interval=200", "recipe.checkpoint_interval=2")
    process = start(work, *TINY, *limits, "hydra.run.dir=killed/first")
    last = work / "killed" / "first" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step = read_checkpoint(last).step
    assert 2 <= step < 200
    arguments = (
        *TINY,
        f"recipe.max_steps={step + 2}",
        "recipe.val_interval=2",
        "resume=last",
        "hydra.run.dir=killed/second",
    )
    assert call("train", *arguments) == 0
    assert json.loads((work / "killed" / "second" / "metrics.json").read_text())["step"] == step + 2


def test_a_users_mistake_shows_no_traceback(work):
    out, err = (process := start(work, "dataset=cityscapes", "trainer=cpu")).communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" not in out + err
    assert "dataset=synthetic to start now" in err
