"""The page with all runs."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from pem_lightning.callbacks.loggers import RunStart
from pem_lightning.callbacks.tensorboard import TensorBoard

SCRIPT = Path(__file__).parents[2] / "scripts" / "dashboard.py"


@pytest.fixture(scope="module")
def dashboard():
    spec = importlib.util.spec_from_file_location("dashboard", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(folder, lr):
    config = {"seed": 0, "task": {"monitor": "val/PQ"}, "recipe": {"lr": lr, "flip": True}}
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(config))
    logger = TensorBoard(folder)
    logger.record_start(RunStart(config, [], "val/PQ", 0))
    logger.log_metrics({"val/PQ": 100 * lr}, 9)
    logger.finalize("success")


def test_no_runs_is_one_line(dashboard, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dashboard.py"])
    assert dashboard.main() == 2
    assert capsys.readouterr().err == (
        "error: no runs in outputs or multirun: start one with python train.py (not with logger=csv)\n"
    )


def test_runs_latest_first(dashboard, tmp_path):
    for name, age in (("a/old", 100), ("b/c/new", 300), ("a/middle", 200)):
        (tmp_path / name).mkdir(parents=True)
        file = tmp_path / name / "events.out.tfevents.1.host"
        file.touch()
        os.utime(file, (age, age))
    runs = dashboard.find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "missing"])
    assert [run.name for run in runs] == ["new", "middle", "old"]


def test_folders_come_together_under_their_names(dashboard, tmp_path):
    folders = [tmp_path / name for name in ("x/outputs", "y/outputs", "multirun")]
    (tmp_path / "together").mkdir()
    dashboard.link_folders(folders, tmp_path / "together")
    links = {path.name: path.readlink() for path in (tmp_path / "together").iterdir()}
    assert links == {"outputs": folders[0], "outputs_1": folders[1], "multirun": folders[2]}


def test_a_port_that_is_taken_is_passed_over(dashboard):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert dashboard.free_port(port) > port
        with pytest.raises(SystemExit, match="choose another with PORT"):
            dashboard.free_port(port, tries=1)


@pytest.mark.slow
def test_the_page_shows_all_runs_and_what_differs(tmp_path):
    for name, lr in (("outputs/set/one", 0.1), ("multirun/sweep/0_lr", 0.2)):
        make_run(tmp_path / name, lr)
    command = [sys.executable, str(SCRIPT), "--port", "17006"]
    page = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        said = [page.stdout.readline() for _ in range(3)]
        assert said[0].startswith("2 runs in outputs, multirun, the latest ")
        url = re.match(r"open (http://localhost:\d+/)\n", said[1])[1]
        with urllib.request.urlopen(url + "data/runs") as answer:
            assert {"outputs/set/one", "multirun/sweep/0_lr"} <= set(json.load(answer))
        with urllib.request.urlopen(url + "data/plugin/scalars/scalars?tag=val/PQ&run=outputs/set/one") as answer:
            ((_, step, value),) = json.load(answer)
        assert (step, value) == (10, pytest.approx(10))
        with urllib.request.urlopen(url + "data/plugin/hparams/experiment?request=%7B%7D") as answer:
            columns = json.load(answer)["hparamInfos"]
        assert columns[0]["name"] == "recipe.lr"
        assert columns[0]["differs"]
        assert "differs" not in columns[1] or not columns[1]["differs"]
    finally:
        page.send_signal(signal.SIGINT)
        assert page.wait(20) == 0
