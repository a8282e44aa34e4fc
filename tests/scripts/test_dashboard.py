"""The page with all runs."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

COMMAND = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "dashboard.py")]


def test_no_runs_is_one_line(tmp_path):
    page = subprocess.run(COMMAND, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert page.returncode == 2
    assert page.stderr == (
        "error: no runs in outputs or multirun: start one with python train.py (not with logger=csv)\n"
    )


@pytest.mark.slow
def test_the_page_shows_the_runs_of_all_folders(tmp_path):
    for name in ("outputs/set/one", "multirun/sweep/0_lr"):
        logger = TensorBoardLogger(tmp_path / name, name="", version="")
        logger.log_metrics({"val/PQ": 10.0}, 9)
        logger.finalize("success")
    page = subprocess.Popen([*COMMAND, "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        url = next(found[0] for line in page.stderr if (found := re.search(r"http://localhost:\d+/", line)))
        with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?tag=val/PQ&run=outputs/set/one") as answer:
            ((_, step, value),) = json.load(answer)
        assert (step, value) == (9, 10.0)
        with urllib.request.urlopen(f"{url}data/runs") as answer:
            assert {"outputs/set/one", "multirun/sweep/0_lr"} <= set(json.load(answer))
    finally:
        page.send_signal(signal.SIGINT)
        page.communicate(timeout=20)
