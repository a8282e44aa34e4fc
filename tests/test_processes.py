"""Worker processes and signals: they hear none that their group gets, and end when the process that made them has."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import resource_tracker

import pytest

from pem_lightning.processes import GROUP_SIGNALS, Interrupted, WorkerLoader, start_worker, stop_in_order
from tests.jobs import ROOT, exit_code, in_group
from tests.training.killing import signal_group

START_METHODS = ["fork", *(pytest.param(method, marks=pytest.mark.slow) for method in ("spawn", "forkserver"))]


def signal_once(item):
    """An item of a loader; with the first one, its group is signalled."""
    if item == 0:
        for number in GROUP_SIGNALS:
            signal_group(number.name)
    return item


def hang(folder):
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def is_alive(process):
    status = subprocess.run(["ps", "-o", "stat=", "-p", process], capture_output=True, text=True).stdout.strip()
    return status != "" and not status.startswith("Z")


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_do_not_hear_signals_to_their_group(method):
    def load():
        heard = []
        for number in GROUP_SIGNALS:
            signal.signal(number, lambda number, frame: heard.append(number))
        options = {"batch_size": None, "num_workers": 2, "collate_fn": signal_once, "multiprocessing_context": method}
        loaded = list(WorkerLoader(range(6), **options))
        return 0 if loaded == list(range(6)) and set(heard) == set(GROUP_SIGNALS) else 1

    assert exit_code(in_group(load)) == 0


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_end_when_their_parent_is_killed(tmp_path, method):
    def load():
        options = {"batch_size": None, "num_workers": 2, "collate_fn": hang, "multiprocessing_context": method}
        return len(list(WorkerLoader([tmp_path, tmp_path], **options)))

    parent = in_group(load)
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [path.name for path in tmp_path.iterdir()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert wait_for(lambda: not any(map(is_alive, workers)), seconds=10)


def ready_then_hang(started):
    start_worker()
    started.set()
    time.sleep(600)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="the system does not say who sent a signal")
def test_a_parent_can_terminate_a_worker_that_hangs():
    context = multiprocessing.get_context("fork")
    worker = context.Process(target=ready_then_hang, args=(started := context.Event(),))
    worker.start()
    assert started.wait(60)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_a_system_that_cannot_block_signals(monkeypatch):
    """As Windows, which has no process for what is shared either."""
    resource_tracker.ensure_running()
    monkeypatch.setattr(resource_tracker, "ensure_running", None)
    monkeypatch.delattr(signal, "pthread_sigmask")
    loader = WorkerLoader(range(3), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert list(loader) == [0, 1, 2]


def test_characters_that_the_output_cannot_hold():
    code = "from pem_lightning.processes import print_any_character as p; p(); print('路 é')"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert done.stdout.decode("cp1252").strip() == r"\u8def é"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_is_tidied_up_and_two_signals_at_once_are_one(number, capfd):
    before = signal.getsignal(number)
    tidied = []

    def command():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # as `timeout` does
            tidied.append(True)

    with pytest.raises(Interrupted) as stop, stop_in_order():
        command()
    assert tidied
    assert stop.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert capfd.readouterr().err == f"\n{number.name}: stopping\n"


@pytest.mark.parametrize("job", ["train", "evaluate", "predict", "export", "app"])
def test_an_interrupt_during_the_imports_leaves_no_traceback(job):
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-v", str(ROOT / f"{job}.py")], stderr=pipe, text=True)
    assert any("torch" in line for line in child.stderr)  # an import of many seconds has begun
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == -signal.SIGINT
    assert "Traceback" not in err


def test_in_a_job_of_joblib_a_loader_may_have_workers_or_none(monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none=False: "loky")
    assert list(WorkerLoader([1, 2], batch_size=None, num_workers=0)) == [1, 2]
    assert WorkerLoader([1, 2], num_workers=1).multiprocessing_context.get_start_method() in ("fork", "spawn")
