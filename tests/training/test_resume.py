"""The parts of exact resume; `test_interrupted` puts them together."""

import logging
import os
import random
import resource
import signal

import numpy as np
import pytest
import torch

from pem_lightning.training.resume import AtomicCheckpointIO, _moved, seed_step
from pem_lightning.training.signals import Interrupted, StopSignals, requeue
from pem_lightning.types import UserError


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_step_draws_by_seed_step_and_process_alone():
    seed_step(3, 7, 0)
    first = draw()
    draw()
    seed_step(3, 7, 0)
    assert draw() == first
    for other in ((4, 7, 0), (3, 8, 0), (3, 7, 1)):
        seed_step(*other)
        assert not set(draw()) & set(first)


def test_the_best_checkpoint_is_known_where_its_folder_was_moved_to(tmp_path):
    def state(folder):
        best = f"{folder}/best.ckpt"
        paths = {"best_model_path": best, "kth_best_model_path": best, "last_model_path": ""}
        return {"dirpath": str(folder), **paths, "best_k_models": {best: 7.0}, "best_model_score": 7.0}

    before = state("/before")
    assert _moved(before, str(tmp_path)) == before  # another folder, without the file
    (tmp_path / "best.ckpt").write_text("")
    assert _moved(before, str(tmp_path)) == state(tmp_path)


@pytest.fixture
def disk():
    """Sets how large a file can become, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_old_file_until_there_is_room(tmp_path, disk, caplog):
    plugin, path = AtomicCheckpointIO(), tmp_path / "folder" / "a.ckpt"
    plugin.save_checkpoint({"step": 1}, path)
    large = {"step": 2, "weights": torch.rand(100_000)}
    disk(100_000)
    with caplog.at_level(logging.WARNING):
        plugin.save_checkpoint(large, path)
    disk(resource.RLIM_INFINITY)
    assert f"CANNOT WRITE {path} (File too large)" in caplog.text
    assert plugin.load_checkpoint(path, weights_only=True) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.ckpt"]
    with pytest.raises(UserError, match=r"a\.ckpt could not be written \(File too large\): make room, and resume"):
        plugin.check()
    plugin.save_checkpoint(large, path)
    plugin.check()
    assert plugin.load_checkpoint(path, weights_only=True)["step"] == 2


def test_what_cannot_be_pickled_is_an_error(tmp_path):
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint({"bug": lambda: None}, tmp_path / "a.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_signals_are_noted_and_handlers_put_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    assert "SIGTERM: finishing this step and saving" in capfd.readouterr().err
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)
    signals.remove()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [Interrupted(number).code for number in (signal.SIGINT, signal.SIGTERM)] == [130, 143]


def test_a_foreign_handler_of_sigterm_is_left_in_place():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        signals = StopSignals()
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.remove()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
    assert signals.received is None


@pytest.mark.parametrize(("code", "answer"), [(0, "queues job 7_2 again"), (1, "does not queue job 7_2 again: no")])
def test_slurm_is_asked(tmp_path, monkeypatch, code, answer):
    program = tmp_path / "scontrol"
    program.write_text(f'#!/bin/sh\n[ "$*" = "requeue 7_2" ] && echo no >&2\nexit {code}\n')
    program.chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", "")
    assert "no scontrol" in requeue()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert answer in requeue()
