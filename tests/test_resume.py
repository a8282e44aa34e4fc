import csv
import io
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from pem_lightning.callbacks.visualization import log_files, read_metrics
from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.cli.overrides import stay_in_resumed_run, tidy_up
from pem_lightning.types import UserError
from tests.checkpoint_files import CLASSES


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


def config(folder, **changes):
    run = {"hydra": {"run": {"dir": str(folder)}}, "trainer": {"max_steps": 100}, "seed": 0, "weights": None}
    return OmegaConf.create({**run, "resume": "last", **changes})


def test_a_resumed_run_has_its_own_folder_and_choices(tmp_path):
    write(tmp_path / "old", 3)
    path = write(tmp_path / "new", 7, overrides=["task=semantic", "recipe.batch_size=2", "weights=a.pth", "resume=x"])
    arguments = ["resume=last", "task=panoptic"]
    resumed = stay_in_resumed_run(config(tmp_path / "unused"), arguments)
    expected = ["recipe.global_batch_size=2", "weights=a.pth", "task=panoptic"]
    assert resumed == [*expected, f"hydra.run.dir='{tmp_path / 'new'}'", f"resume='{path}'"]
    # The processes that Lightning adds read the rewritten command line.
    again = stay_in_resumed_run(config(tmp_path, resume=str(path), weights="a.pth"), resumed)
    assert sorted(again) == sorted(resumed)


def test_auto_starts_or_goes_on(tmp_path, capsys):
    arguments = [f"hydra.run.dir={tmp_path}/run", "resume=auto", "weights=a.pth"]
    auto = config(tmp_path / "run", resume="auto", weights="a.pth")
    assert stay_in_resumed_run(auto, arguments) == [arguments[0], arguments[2]]
    path = write(tmp_path / "run", 7, name="last-previous.ckpt")
    assert stay_in_resumed_run(auto, arguments)[-1] == f"resume='{path}'"
    assert f"last.ckpt does not exist; GOING ON FROM {path}, which is of step 7" in capsys.readouterr().err
    write(tmp_path / "run", 100)
    with pytest.raises(SystemExit) as stop:
        stay_in_resumed_run(auto, arguments)
    assert stop.value.code == 0
    with pytest.raises(UserError, match=r"say hydra\.run\.dir"):
        stay_in_resumed_run(auto, ["resume=auto"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"weights": "b.pth"}, "leave one of them out"), ({"seed": 1}, "leave seed=1 out")],
)
def test_a_resumed_run_cannot_begin_otherwise(tmp_path, changes, message):
    path = write(tmp_path / "run", 7)
    arguments = [f"{key}={value}" for key, value in changes.items()]
    with pytest.raises(UserError, match=message):
        stay_in_resumed_run(config(tmp_path, resume=str(path), **changes), arguments)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "flipped"])
def test_damage_of_any_kind_is_noticed(tmp_path, damage, capsys):
    path, before = write(tmp_path / "run", 9, seed=1), write(tmp_path / "run", 7, name="last-previous.ckpt")
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[content.index(b"dataset_info")] ^= 1
    path.write_bytes({"truncated": content[:-100], "empty": b"", "garbage": b"x" * 500, "flipped": content}[damage])
    resumed = stay_in_resumed_run(config(tmp_path, resume=str(path)), [f"resume={path}"])
    assert resumed[-1] == f"resume='{before}'"
    assert f"{path} is damaged" in capsys.readouterr().err
    before.write_bytes(b"")
    with pytest.raises(UserError, match="neither can be resumed"):
        stay_in_resumed_run(config(tmp_path, resume=str(path)), [f"resume={path}"])


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
    assert Path(leftover.parent).exists()
