"""The overrides that a checkpoint brings, and what becomes of a resumed run's folder."""

import csv
import io

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from pem_lightning.callbacks.visualization import log_files, read_metrics
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.cli.errors import compose, key_of
from pem_lightning.cli.jobs import tidy_up
from pem_lightning.cli.overrides import literal_paths, parse, take_over
from pem_lightning.types import UserError
from tests.checkpoint_files import CLASSES, write_checkpoint


def write(run, step, name="last.ckpt", overrides=(), seed=0):
    path = run / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (run / ".hydra").mkdir(exist_ok=True)
    ours = {
        "config": {"seed": seed, "weights": "a.pth"},
        "overrides": list(overrides),
        "dataset_info": {"name": "toy", "classes": list(CLASSES)},
    }
    torch.save({"state_dict": {}, "global_step": step, "optimizer_states": [], CHECKPOINT_KEY: ours}, path)
    return path


@pytest.mark.parametrize(
    ("override", "key"), [("a.b=1", "a.b"), ("+a=1=2", "a"), ("~a", "a"), ("++a.b=", "a.b"), ("a@b=c", "a")]
)
def test_key_of(override, key):
    assert key_of(override) == key


NAMES = (
    *(
        "epoch=3-step=600.png",
        "photo (1).png",
        "it's.png",
        "a'b\".png",
        "{y}.png",
        "#1.png",
        "a,b.png",
        "[x].png",
        "[x]",
    ),
    *(
        "a[1].png",
        "$a.png",
        "${a}.png",
        "a\\${b}",
        "back\\",
        "C:\\d",
        "a&b;c|d.png",
        "背景.png",
        "ü.png",
        "1_000",
        "1e3",
    ),
    *("007", "true", "null", "~x", "choice(a,b)", "'a.png'", "a@b:c", "a b.png", " a", "x: y"),
)


def read(override):
    """The value of an override in a composed experiment."""
    (parsed,) = parse([override], "train")
    return OmegaConf.create({"device": "auto", "value": parsed.value()}).value


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_taken_as_they_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    overrides = literal_paths([f"input={name}", f"checkpoint={name}", f"output={name}", f"++dataset.root={name}"])
    assert literal_paths(overrides) == overrides
    assert literal_paths(overrides, sweep=True) == overrides
    assert [str(read(override)) for override in overrides] == [name] * 4


@pytest.mark.parametrize(
    "name", ["a=1", "out (1)", "a,b", "[x]", "{y}", "#1", "ü", "it's", "choice(a,b)", "true", "$a"]
)
def test_folders_that_are_still_to_be_made_are_taken_as_they_are(name):
    (override,) = literal_paths([f"output={name}"])
    assert read(override) == name


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        ("'a b'", "a b"),
        ('"it\'s"', "it's"),
        (r"a\,b", "a,b"),
        ("${device}.png", "auto.png"),
        ("null", None),
        ("0", 0),
        ("in/*.png", "in/*.png"),
        ("[a.png,b.png]", ["a.png", "b.png"]),
        ("[a (1).png,ü=1.png]", ["a (1).png", "ü=1.png"]),
        ("rtsp://u:p@camera/x?y=1&z=[2]", "rtsp://u:p@camera/x?y=1&z=[2]"),
    ],
)
def test_syntax_counts_where_no_file_has_the_name(value, meaning):
    (override,) = literal_paths([f"input={value}"])
    assert read(override) == meaning


def test_on_windows_a_backslash_is_part_of_a_path(monkeypatch):
    monkeypatch.setattr("os.sep", "\\")
    (override,) = literal_paths([r"output=\\server\share\new"])
    assert read(override) == r"\\server\share\new"


@pytest.mark.parametrize(
    ("value", "swept"),
    [
        ("a.ckpt,b.ckpt", "a.ckpt,b.ckpt"),
        ("epoch=1.ckpt,epoch=2.ckpt", "'epoch=1.ckpt','epoch=2.ckpt'"),
        ("choice(a,b)", "choice(a,b)"),
        ("there,too.ckpt", "'there,too.ckpt'"),
    ],
)
def test_a_sweep_over_paths(value, swept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there,too.ckpt").touch()
    assert literal_paths([f"checkpoint={value}"], sweep=True) == [f"checkpoint={swept}"]


def test_other_keys_keep_hydras_syntax():
    overrides = ["ablation=[no_csm,fpn]", "~input", "recipe.lr=1,2", "input", "class_weight=(1)"]
    assert literal_paths(overrides) == overrides


def test_a_checkpoint_of_any_name_brings_its_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("epoch=3-step=600.ckpt", "${a} (1).ckpt", "it's.ckpt"):
        write_checkpoint(tmp_path / name, nn.Linear(1, 1), ["task=semantic"])
        overrides, checkpoint = take_over("evaluate", literal_paths([f"checkpoint={name}"]))
        assert overrides[0] == "task=semantic"
        assert str(checkpoint.path) == name
    path = write(tmp_path / "a=1 ${b} it's", 7)
    resumed, checkpoint = take_over("train", literal_paths([f"resume={path}"]))
    assert compose("train", resumed).hydra.run.dir == str(path.parent.parent)
    assert checkpoint.path == path


def test_evaluation_takes_over_what_is_no_part_of_training(tmp_path):
    overrides = ("weights=a.pth", "seed=3", "resume=b.ckpt", "trainer=cpu", "+callbacks.x=1", "task=semantic")
    path = write_checkpoint(tmp_path / "a.ckpt", nn.Linear(1, 1), overrides)
    given = [f"checkpoint='{path}'", "seed=4"]
    taken, checkpoint = take_over("evaluate", given)
    assert taken == ["task=semantic", *given]
    assert checkpoint.path == path
    assert take_over("predict", ["seed=1"]) == (["seed=1"], None)


def test_a_resumed_run_has_its_own_folder_and_choices(tmp_path):
    path = write(tmp_path / "new", 7, overrides=["task=semantic", "num_queries=5", "weights=a.pth", "resume=x"])
    (resumed, checkpoint) = take_over("train", [f"resume={path}", "task=panoptic"])
    assert resumed == [
        "num_queries=5",
        "weights=a.pth",
        "task=panoptic",
        f"hydra.run.dir='{tmp_path / 'new'}'",
        f"resume='{path}'",
    ]
    assert checkpoint.step == 7
    again, _ = take_over("train", resumed)
    assert sorted(again) == sorted(resumed)


def test_a_run_that_was_given_its_output_folder_goes_on_there(tmp_path):
    path = write(tmp_path / "own", 7, overrides=["output_dir=own"])
    (tmp_path / "own" / ".hydra").rmdir()  # which is in hydra.run.dir
    resumed, _ = take_over("train", [f"resume={path}"])
    assert compose("train", resumed).output_dir == str(tmp_path / "own")
    resumed, _ = take_over("train", [f"resume={path}", "output_dir=other"])
    assert compose("train", resumed).output_dir == "other"


def test_last_is_the_newest_run(tmp_path):
    write(tmp_path / "old", 3)
    path = write(tmp_path / "new", 7)
    resumed, _ = take_over("train", ["resume=last", f"hydra.run.dir={tmp_path}/unused"])
    assert resumed[-1] == f"resume='{path}'"


def test_auto_starts_or_goes_on(tmp_path, capsys):
    arguments = [f"hydra.run.dir={tmp_path}/run", "resume=auto", "weights=a.pth"]
    assert take_over("train", arguments) == ([arguments[0], arguments[2]], None)
    path = write(tmp_path / "run", 7, name="last-previous.ckpt")
    assert take_over("train", arguments)[0][-1] == f"resume='{path}'"
    assert f"last.ckpt does not exist; GOING ON FROM {path}, which is of step 7" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"say hydra\.run\.dir"):
        take_over("train", ["resume=auto"])


@pytest.mark.parametrize(
    ("change", "message"), [("weights=b.pth", "leave one of them out"), ("seed=1", "leave seed=1 out")]
)
def test_a_resumed_run_cannot_begin_otherwise(tmp_path, change, message):
    path = write(tmp_path / "run", 7)
    with pytest.raises(UserError, match=message):
        take_over("train", [f"resume={path}", change])


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
def test_damage_of_any_kind_is_noticed(tmp_path, damage, capsys):
    path, before = write(tmp_path / "run", 9, seed=1), write(tmp_path / "run", 7, name="last-previous.ckpt")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(b"dataset_info")] ^= 1
    path.write_bytes({"truncated": content[:-100], "empty": b"", "garbage": b"x" * 500, "flipped": content}[damage])
    assert take_over("train", [f"resume={path}"])[0][-1] == f"resume='{before}'"
    assert f"{path} is damaged" in capsys.readouterr().err
    before.write_bytes(b"")
    with pytest.raises(UserError, match="neither can be resumed"):
        take_over("train", [f"resume={path}"])


def log(*rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, ["step", "epoch", "train/loss", "val/PQ"])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def row(step, loss="", quality=""):
    return {"step": step, "epoch": 0, "train/loss": loss, "val/PQ": quality}


def test_logs_end_where_a_resumed_run_goes_on(tmp_path):
    """Twice from the same checkpoint, with a row that a kill cut off: nothing is lost, doubled or contradicted."""
    folder = tmp_path / "csv"
    folder.mkdir()
    for loss in (1.0, 2.0):
        first = [row(step, loss) for step in range(5)] if loss == 1.0 else []
        (folder / "metrics.csv").write_text(log(*first, row(3, quality=30), *(row(s, loss) for s in (4, 5))) + "6,0,1")
        tidy_up(tmp_path, step=4)
        assert [path.name for path in folder.iterdir()] == ["metrics_before_step_0000004.csv"]
    metrics = read_metrics(log_files(folder))
    assert metrics == {"train/loss": [(n, 1.0) for n in (1, 2, 3, 4)], "val/PQ": [(4, 30.0)]}
    assert (folder / "metrics_before_step_0000004.csv").read_text().count("\n") == 5
    tidy_up(tmp_path, step=None)
    assert list(folder.iterdir()) == []


def test_half_written_files_are_removed(tmp_path):
    leftover = tmp_path / "checkpoints" / ".last-next.ckpt.99.tmp"
    leftover.parent.mkdir()
    leftover.write_text("half")
    tidy_up(tmp_path, step=None)
    assert not leftover.exists()
    assert leftover.parent.exists()
