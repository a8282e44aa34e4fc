"""Signals that ask a training to stop: noted when they come, obeyed between two steps."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment

LAST = "last.ckpt"
PREVIOUS = "last-previous.ckpt"


class Interrupted(SystemExit):
    """A training stopped because it was asked to, after it saved where it stands.

    Attributes:
        signal: which asked.

    The exit code is the shell's: 128 and the signal's number, 130 for Ctrl-C, 143 for SIGTERM.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopSignals:
    """Notes Ctrl-C, SIGTERM, and SLURM's early warning (SIGUSR1, only in a SLURM job) instead of dying of them.

    A second Ctrl-C stops at once. To be made before Lightning installs its own handlers; one for SIGTERM that somebody
    else has installed by then is left in place.

    Attributes:
        received: the signal that came first, None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if SLURMEnvironment.detect() else [])]
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
        if self._before[signal.SIGTERM] not in (None, signal.SIG_DFL):
            del self._before[signal.SIGTERM]
        self._installed = False

    def install(self) -> None:
        """Start to listen, in the place of Lightning; only the main thread can."""
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
            self.received = number
            again = "; once more stops at once, without saving" if number == signal.SIGINT else ""
            # Neither print nor a logger may be used in here: they may be the ones that were interrupted.
            os.write(2, f"\n{signal.Signals(number).name}: finishing this step and saving{again}\n".encode())
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def resume_command(checkpoint: Path) -> str:
    """What to type to go on."""
    return f"python train.py resume={checkpoint}"


def requeue() -> str:
    """Ask SLURM to start this job again; returns what came of it."""
    environment = os.environ
    job = environment.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
    program = shutil.which("scontrol")
    if program is None or not re.fullmatch(r"[0-9_]+", job):
        return "SLURM cannot be asked to queue the job again: no scontrol or no job number here"
    done = subprocess.run([program, "requeue", job], capture_output=True, text=True)
    if done.returncode:
        return f"SLURM does not queue job {job} again: {done.stderr.strip() or done.returncode}"
    return f"SLURM queues job {job} again"
