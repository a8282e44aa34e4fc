"""Signals that reach a whole group of processes, and worker processes that end with the one that made them.

Ctrl-C in a terminal, `timeout`, SLURM and service managers signal every process of a group. What to do then is the main
process's business: its workers do not hear these signals, and stay until it has saved.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, parent_process, resource_tracker
from types import FrameType
from typing import Any

from torch.utils.data import DataLoader

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
GROUP_SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""What a group is asked to stop with, or warned by; SIGUSR2 is submitit's. Windows has the first two."""
REPEAT_SECONDS = 1.0
"""The same signal again within this time is the same wish: `timeout` signals the process, and then its group."""
_POLL_SECONDS = 0.5


class Interrupted(SystemExit):
    """A signal asked to stop. The exit code is the shell's: 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class WorkerLoader(DataLoader[Any]):
    """A DataLoader whose workers leave signals to this process, and end when it has ended, however it did."""

    def __init__(self, dataset: Any, **options: Any) -> None:
        options.setdefault("worker_init_fn", start_worker)
        # In a job of joblib, and for joblib only; without workers, a context is refused.
        if options.get("num_workers") and multiprocessing.get_start_method(allow_none=True) == "loky":
            options.setdefault("multiprocessing_context", "fork" if sys.platform == "linux" else "spawn")
        super().__init__(dataset, **options)

    def __iter__(self) -> Any:
        """Start the workers; they inherit the blocked signals, so that there is no moment in which one kills them."""
        method = (self.multiprocessing_context or multiprocessing).get_start_method() if self.num_workers else "fork"
        if method != "fork" and hasattr(signal, "pthread_sigmask"):  # Windows has no such process
            resource_tracker.ensure_running()  # which would unblock them, if it was started with the first worker
        before = _block()
        try:
            return super().__iter__()
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _block() -> set[int] | None:
    """Block the signals in this thread; returns what was blocked, or None on Windows, which cannot."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS) if hasattr(signal, "pthread_sigmask") else None


def start_worker(worker_id: int = 0) -> None:
    """Leave signals to the parent, and end with it; to be called in a process of `multiprocessing`."""
    if _block() is None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    if parent is not None:
        _start_thread(_end_with, parent)


def _end_with(parent: Any) -> None:
    """End this process when the parent has ended, or terminates it: a worker that hangs must not keep the parent.

    What `is_alive` looks at is open in forked siblings, too; the system's number of the parent stays as it was on
    Windows, and is another process's with "forkserver".
    """
    by_number = sys.platform != "win32" and os.getppid() == parent.pid
    while os.getppid() == parent.pid if by_number else parent.is_alive():
        if not hasattr(signal, "sigtimedwait"):  # macOS
            time.sleep(_POLL_SECONDS)
            continue
        heard = signal.sigtimedwait(GROUP_SIGNALS, _POLL_SECONDS)
        if heard is not None and heard.si_signo == signal.SIGTERM and heard.si_pid == parent.pid:
            break
    os._exit(0)


def when_orphaned(action: Callable[[], object], grace: float) -> None:
    """Call `action` in a thread when the parent has ended, and end this process `grace` seconds later."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        action()
        time.sleep(grace)
        os._exit(1)

    _start_thread(watch)


def _start_thread(function: Callable[..., object], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()


_left_at = 0.0


def leave(number: int, frame: FrameType | None) -> None:
    """A handler of signals that raises `Interrupted`: what was begun is tidied up on the way out."""
    global _left_at
    if time.monotonic() - _left_at < REPEAT_SECONDS:
        return
    _left_at = time.monotonic()
    # Neither print nor a logger may be used here: they may be what was interrupted.
    os.write(2, f"\n{signal.Signals(number).name}: stopping\n".encode())
    raise Interrupted(number)


@contextmanager
def stop_in_order() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and, in a SLURM job, its warning SIGUSR1 raise `Interrupted`, see `leave`."""
    global _left_at
    before, _left_at = _install(leave), 0.0
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_any_character() -> None:
    """Let this process print what its console, or the file in its place, cannot hold: as an escape, not as an error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are


class StopJobs:
    """Notes signals in a process that waits: for its jobs in other processes, which save and stop, or for a next job.

    Attributes:
        received: the signal that came first, None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> bool:
        """Install the handler; returns whether it had not been."""
        new = not self._before
        if new:
            self._before = _install(self._note)
        return new

    def __enter__(self) -> StopJobs:
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            if parent_process() is None:
                os.write(2, f"\n{signal.Signals(number).name}: the jobs save and stop\n".encode())
            if sys.platform != "win32":  # where it would kill them, and the console has told them
                for job in active_children():  # which may not have got it; SIGTERM is safe to get twice
                    job.terminate()


def _install(handler: Any) -> dict[int, Any]:
    """Handle what may ask to stop; returns the handlers of before. Those of other libraries are left in place."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        return {}
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
    before = {number: signal.getsignal(number) for number in numbers}
    ours: dict[int, Any] = {number: earlier for number, earlier in before.items() if _is_ours(earlier)}
    for number in ours:
        signal.signal(number, handler)
    return ours


def _is_ours(handler: Any) -> bool:
    """Whether a handler is Python's own or from this module."""
    plain = (signal.SIG_DFL, signal.default_int_handler, leave)
    return handler in plain or isinstance(getattr(handler, "__self__", None), StopJobs)
