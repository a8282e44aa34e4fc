"""`pem_lightning.train`: what train.py does, without leaving a trace in the caller's process."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from PIL import Image

import pem_lightning
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.cli.notebook import _text
from pem_lightning.types import UserError
from tests.jobs import ROOT, TINIEST, call

TINY = [o for o in TINIEST if not o.startswith(("dataset.root=", "dataset.datamodule.", "recipe.global_batch_size"))]
TINY += [
    "recipe.val_interval=2",
    "recipe.checkpoint_interval=1",
    "recipe.eval_transform.shortest_edge=64",
    "weights=null",
]


@pytest.fixture(scope="module")
def data(work):
    """Drawn images: bright rectangles of the class box before dark ground."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for index in range(count):
            labels = np.zeros((64, 128), np.uint8)
            top, left = rng.integers(0, 40), rng.integers(0, 90)
            labels[top : top + 20, left : left + 30] = 1
            image = (labels[..., None] * 150 + rng.integers(0, 60, (64, 128, 3))).astype(np.uint8)
            for kind, array in (("images", image), ("labels", labels)):
                path = work / "my data" / kind / split / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    (work / "my data" / "classes.yaml").write_text("[ground, box]")
    return work / "my data"


def train(data, **more):
    given = {"dataset": "semantic_folder", "root": data, "steps": 3, "batch_size": 2, "overrides": TINY}
    return pem_lightning.train(**{**given, **more})


@pytest.mark.slow
class TestTraining:
    def test_two_in_one_process_equal_train_py_to_the_bit(self, work, data):
        """Its folder is laid out alike, too."""
        own = ("dataset=semantic_folder", f"dataset.root={data}", "recipe.max_steps=3", "recipe.global_batch_size=2")
        assert call("train", *own, *TINY, "hydra.run.dir=command", "seed=5") == 0
        lines = (work / "command" / "run.log").read_text().splitlines()
        run = train(data, output=work / "called", seed=5)
        other = train(data, output="other", seed=6)
        assert (run.folder, other.folder) == (work / "called", work / "other")
        expected, found, different = (
            read_checkpoint(work / name / "checkpoints" / "last.ckpt").network
            for name in ("command", "called", "other")
        )
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        assert not all(torch.equal(value, different[name]) for name, value in expected.items())
        files = [
            sorted(str(p.relative_to(work / name)) for p in (work / name).rglob("*") if p.is_file())
            for name in ("command", "called")
        ]
        assert files[0] == files[1]
        assert ".hydra/overrides.yaml" in files[0]
        assert run.metrics == json.loads((work / "command" / "metrics.json").read_text())
        assert run.metrics["step"] == 3
        assert run.score >= run.metrics["val/mIoU"]
        assert run.checkpoint == work / "called" / "checkpoints" / "best.ckpt"
        assert run.predictor is run.predictor
        assert run.predictor(data / "images" / "val" / "0.png").semantic.shape == (64, 128)
        logged = [line.partition("]")[2] for line in (work / "called" / "run.log").read_text().splitlines()]
        assert logged == [line.partition("]")[2] for line in lines]
        assert any(line.startswith("[pem_lightning.cli.jobs][INFO] PEM, ") for line in logged)

    def test_resume(self, work, data):
        whole = train(data, output=work / "whole", steps=4)
        cut = train(data, output=work / "cut", steps=4, **{"trainer.max_steps": 2})
        resumed = pem_lightning.train(resume=cut.folder / "checkpoints" / "last.ckpt", **{"trainer.max_steps": 4})
        assert resumed.folder == cut.folder
        expected, found = (read_checkpoint(r.folder / "checkpoints" / "last.ckpt").network for r in (whole, resumed))
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
        with pytest.raises(UserError, match=r"last\.ckpt is trained to its last step already"):
            pem_lightning.train(resume=cut.folder / "checkpoints" / "last.ckpt")
        again = train(data, output=work / "cut", steps=4, resume="auto")
        assert again.metrics == resumed.metrics

    def test_what_is_the_callers_stays(self, work, data, tmp_path, capsys):
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        theirs = logging.FileHandler(tmp_path / "theirs.log", "w")
        root = logging.getLogger()
        root.addHandler(theirs)
        before = root.handlers[:], root.level, logging.getLogger("pem_lightning").level, warnings.filters[:]
        np.random.seed(1)
        torch.manual_seed(1)
        expected = np.random.rand(), torch.rand(1).item()
        np.random.seed(1)
        torch.manual_seed(1)
        environment, folder = dict(os.environ), Path.cwd()
        try:
            train(data, output=work / "quiet", steps=1)
            logging.getLogger("mine").warning("still here")
            after = root.handlers[:], root.level, logging.getLogger("pem_lightning").level, warnings.filters[:]
        finally:
            root.removeHandler(theirs)
            theirs.close()
        assert after == before
        assert "still here" in (tmp_path / "theirs.log").read_text()
        assert (np.random.rand(), torch.rand(1).item()) == expected
        assert (dict(os.environ), Path.cwd()) == (environment, folder)
        assert {n: signal.getsignal(n) for n in handlers} == handlers
        assert not GlobalHydra.instance().is_initialized()

    def test_in_another_thread_and_while_an_own_hydra_app_runs(self, work, data, tmp_path):
        (tmp_path / "conf").mkdir()
        (tmp_path / "conf" / "mine.yaml").write_text("backbone: oak\nsteps: 7\n")
        runs = []
        with hydra.initialize_config_dir(str(tmp_path / "conf"), job_name="mine", version_base="1.2"):
            app = GlobalHydra.instance().hydra
            thread = threading.Thread(target=lambda: runs.append(train(data, output=work / "thread", steps=1)))
            thread.start()
            thread.join()
            assert GlobalHydra.instance().hydra is app
            assert hydra.version.getbase() == hydra.version.Version("1.2")
            assert JobRuntime.instance().get("name") == "mine"
            assert hydra.compose("mine") == {"backbone": "oak", "steps": 7}
        assert runs[0].metrics["step"] == 1

    def test_runs_of_one_second_have_folders_of_their_own(self, work, data, monkeypatch):
        monkeypatch.chdir(work)
        folders = {train(data, steps=1, debug="fast").folder for _ in range(2)}
        assert len(folders) == 2
        assert {folder.parents[1] for folder in folders} == {work / "outputs"}

    def test_ctrl_c_saves_and_raises(self, work, data):
        """In a process of its own, as a notebook's kernel is interrupted."""
        code = f"""
import random, signal
import pem_lightning
random.seed(1)
expected = random.random()
random.seed(1)
try:
    pem_lightning.train(dataset="semantic_folder", root={str(data)!r}, steps=100000, batch_size=2,
        output={str(work / "stopped")!r}, overrides={TINY!r} + ["recipe.val_interval=100000"])
except KeyboardInterrupt:
    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, random.random() == expected)
"""
        child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        last = work / "stopped" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not last.exists() and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.2)
        step = read_checkpoint(last).step
        child.send_signal(signal.SIGINT)
        printed, _ = child.communicate(timeout=60)
        assert printed.splitlines()[-1] == "True True"
        assert child.returncode == 0
        assert read_checkpoint(last).step >= step
        resumed = pem_lightning.train(resume=last, steps=read_checkpoint(last).step + 1)
        assert resumed.metrics["step"] == read_checkpoint(last).step


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"backbon": "stdc1"}, r"train\(\) has no argument backbon \(did you mean backbone\?\)"),
            ({"step": 3}, r"train\(\) has no argument step \(did you mean steps\?\)"),
            ({"backbone": "stdc3"}, r"there is no backbone=stdc3 \(did you mean stdc[12]\?\)"),
            ({"recipe.max_step": 3}, r"there is no key recipe.max_step \(did you mean recipe.max_steps\?\)"),
            ({"overrides": ["recipe.max_step=3"]}, r"there is no key recipe.max_step"),
            ({"dataset": "semantic_folder", "root": "nowhere"}, r"nowhere.classes\.yaml does not exist"),
            ({"trainer.devices": 2}, "trains on one device, not on trainer.devices=2"),
            ({"trainer": "ddp"}, "trains on one device"),
            ({"seed": object()}, r"train\(seed=...\) is a object"),
            ({"overrides": ["seed=0,1"]}, "[Ss]weep"),
            ({"resume": "missing.ckpt"}, r"missing\.ckpt does not exist"),
            ({"weights": "missing.pth", "trainer": "cpu"}, r"weights=missing\.pth does not exist"),
        ],
    )
    def test_are_exceptions_of_one_line(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message) as error:
            pem_lightning.train(**{"dataset": "synthetic", "logger": "none", "overrides": [], **arguments})
        assert len(str(error.value).splitlines()) == 1
        assert not GlobalHydra.instance().is_initialized()
        assert Path.cwd() == tmp_path

    def test_the_data_are_checked(self, tmp_path, data, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for split in ("train", "val"):
            for kind in ("images", "labels"):
                target = tmp_path / "broken" / kind / split
                target.mkdir(parents=True)
                for path in (data / kind / split).iterdir():
                    target.joinpath(path.name).write_bytes(path.read_bytes())
        (tmp_path / "broken" / "classes.yaml").write_text("[ground]")
        with pytest.raises(UserError, match="has the value 1, which is neither a class nor void"):
            train(tmp_path / "broken", output="run")


def test_values_in_hydras_grammar():
    given = {None: "null", True: "true", 3: "3", 0.5: "0.5", 1e-05: "1e-05", "stdc1": "stdc1", "a b": "'a b'"}
    assert {value: _text("x", value) for value in given} == given
    assert _text("x", [64, "a,b"]) == "[64,'a,b']"
    assert _text("x", {"car": 2.0}) == "{car:2.0}"
    assert _text("x", np.float32(0.5)) == "0.5"
    assert _text("root", "~/data") == f"{Path.home()}/data"
    assert _text("root", Path("a=b")) == "'a=b'"
