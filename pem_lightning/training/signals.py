"""Signals that ask a training to stop: noted when they come, obeyed between two steps."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment

from pem_lightning.processes import REPEAT_SECONDS, Interrupted, leave


class StopSignals:
    """Notes Ctrl-C, SIGTERM and, in a SLURM job, its early warning SIGUSR1, instead of dying of them.

    A second Ctrl-C stops at once. Construct it before Lightning installs its own handlers; somebody else's handler of
    SIGTERM is left in place.

    Attributes:
        received: the signal that came first, None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        if self._before[signal.SIGTERM] not in (None, signal.SIG_DFL, leave):
            del self._before[signal.SIGTERM]
        self._installed = False
        self._received_at = 0.0

    def install(self) -> None:
        """Listen in Lightning's place; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in self._before:
                signal.signal(number, self._note)
            self._installed = True

    def remove(self) -> None:
        """Put back what was there before."""
        if self._installed:
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._installed = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = number, time.monotonic()
            again = "; once more stops at once, without saving" if number == signal.SIGINT else ""
            # Neither print nor a logger may be used here: they may be what was interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving{again}\n".encode())
        elif number == signal.SIGINT and (
            self.received != number or time.monotonic() - self._received_at > REPEAT_SECONDS
        ):
            raise Interrupted(number)


def requeue() -> str:
    """Ask SLURM to start this job again; returns what came of it."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    program = shutil.which("scontrol")
    if program is None or not re.fullmatch(r"[0-9_]+", job):
        return "SLURM cannot be asked to queue the job again: no scontrol or no job number here"
    done = subprocess.run([program, "requeue", job], capture_output=True, text=True)
    if done.returncode:
        return f"SLURM does not queue job {job} again: {done.stderr.strip() or done.returncode}"
    return f"SLURM queues job {job} again"
