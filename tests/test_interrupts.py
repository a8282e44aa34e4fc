import os
import signal

import pytest

from pem_lightning.training.signals import Interrupted, StopSignals, requeue


def test_signals_are_noted_and_handlers_put_back(capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    signals = StopSignals()
    signals.install()
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    assert "SIGTERM: finishing this step and saving" in capfd.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    signals.remove()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


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


def test_exit_codes_are_the_shells():
    assert [Interrupted(number).code for number in (signal.SIGINT, signal.SIGTERM)] == [130, 143]


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
