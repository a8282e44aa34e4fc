"""The overrides that a checkpoint brings, and what becomes of a resumed run's folder."""

import csv
import io

import pytest
import torch
from torch import nn

from pem_lightning.callbacks.visualization import log_files, read_metrics
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.cli.errors import key_of
from pem_lightning.cli.jobs import tidy_up
from pem_lightning.cli.overrides import take_over
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
