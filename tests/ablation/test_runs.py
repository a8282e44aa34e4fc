import pytest

from pem_lightning.ablation import read_runs
from pem_lightning.types import UserError
from tests.ablation.conftest import write_log, write_run


def test_runs_are_found_at_any_depth_in_their_natural_order(tmp_path):
    for name in ("10", "2", "1"):
        write_run(tmp_path / "multirun" / "attention" / name, "seed=3", values=[1, 2, 3, 4])
    runs = read_runs([tmp_path])
    assert [run.path.name for run in runs] == ["1", "2", "10"]
    assert {run.seed for run in runs} == {3}
    assert [run.path for run in read_runs([runs[0].path, tmp_path, runs[0].path])] == [run.path for run in runs]


def test_a_finished_run(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", values=[10, 20, 30, 40.5], mIoU=[1, 2, 3, 4])])
    assert (run.dataset, run.task, run.metric, run.backbone) == ("synthetic", "panoptic", "PQ", "stdc1")
    assert run.finished
    assert run.progress == "600 steps"
    assert run.validations("PQ") == {150: 10, 300: 20, 450: 30, 600: 40.5}
    assert run.validations("mIoU")[600] == 4
    assert run.validations("AP") == {}
    assert run.config["network"]["num_queries"] == 40


def test_an_unfinished_run_needs_nothing_but_its_log(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", values=[10.0], steps=180)])
    assert not (run.path / "metrics.json").exists()
    assert not run.finished
    assert run.progress == "180 of 600 steps"
    assert run.validations("PQ") == {150: 10}


def test_the_end_is_known_where_the_log_has_every_tenth_step_only(tmp_path):
    folder = write_run(tmp_path / "run", "recipe.max_steps=605", values=[1.0], steps=600)
    assert not read_runs([folder])[0].finished
    (folder / "metrics.json").write_text('{"step": 605}')
    assert read_runs([folder])[0].finished


def test_a_run_that_was_never_validated(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", steps=20)])
    assert run.validations("PQ") == {}
    assert run.progress == "20 of 600 steps"


def test_a_resumed_run_has_one_curve(tmp_path):
    folder = write_run(tmp_path / "run", values=[])
    write_log(folder / "csv" / "metrics_before_step_0000300.csv", [(150, {"val/PQ": 10.0}), (310, {"train/loss": 1.0})])
    write_log(folder / "csv" / "metrics.csv", [(310, {"train/loss": 2.0}), (450, {"val/PQ": 30.0})])
    (run,) = read_runs([folder])
    assert run.validations("PQ") == {150: 10, 450: 30}
    assert run.series["train/loss"] == [(310, 2.0)]


def test_a_line_that_is_being_written_is_not_read(tmp_path):
    folder = write_run(tmp_path / "run", values=[10.0], steps=180)
    with (folder / "csv" / "metrics.csv").open("a") as file:
        file.write("0,12.3")
    assert read_runs([folder])[0].step == 180


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", values=[10.0, float("nan")], steps=300)])
    assert run.validations("PQ") == {150: 10}


def break_config(folder):
    (folder / ".hydra" / "config.yaml").write_text("job: train\nseed: [")


def lose_a_key(folder):
    (folder / ".hydra" / "config.yaml").write_text("job: train\nseed: 0\ntrainer: {max_steps: 5}\n")


def lose_the_target_of_an_interpolation(folder):
    path = folder / ".hydra" / "config.yaml"
    text = path.read_text()
    assert "num_layers: ${decoder_layers}" in text
    path.write_text(text.replace("num_layers: ${decoder_layers}", "num_layers: ${nowhere}"))


def lose_the_log(folder):
    (folder / "csv" / "metrics.csv").unlink()


def break_the_log(folder):
    (folder / "csv" / "metrics.csv").write_text("step,val/PQ\n0,many\n")


def write_bytes(folder):
    (folder / "csv" / "metrics.csv").write_bytes(b"\xff\xfe\x00step\n\x00\n")


@pytest.mark.parametrize(
    "harm", [break_config, lose_a_key, lose_the_target_of_an_interpolation, lose_the_log, break_the_log, write_bytes]
)
def test_a_broken_run_is_said_in_one_line_and_skipped(tmp_path, harm):
    harm(write_run(tmp_path / "broken", values=[1.0], steps=150))
    write_run(tmp_path / "sound", values=[1.0], steps=150)
    said = []
    assert [run.path.name for run in read_runs([tmp_path], said.append)] == ["sound"]
    (line,) = said
    assert line.startswith(f"skipped {tmp_path / 'broken'}: it ")
    assert "\n" not in line
    with pytest.raises(UserError, match=r"no training run in .*\(1 of them broken\)"):
        read_runs([tmp_path / "broken"], said.append)


def test_other_jobs_are_passed_over(tmp_path):
    folder = write_run(tmp_path / "evaluation", values=[1.0])
    path = folder / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("job: train", "job: evaluate"))
    said = []
    with pytest.raises(UserError, match=r"no training run in .*\(none\): start one"):
        read_runs([tmp_path], said.append)
    assert said == []


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder: give runs"):
        read_runs([tmp_path / "nowhere"])
