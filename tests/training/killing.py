"""Training runs that die: a callback that kills, and how tests compare what is left."""

import os
import signal
import subprocess
from pathlib import Path

import torch
from lightning import Callback

from pem_lightning.training import resume


class Kill(Callback):
    """Kills its process, of several the first, when a step, counted from 1, is reached.

    Args:
        step: of the training.
        moment: "step" within its backward pass; "validation" after the first image of the validation that follows it;
            "write" in the middle of the next checkpoint; "rename" before that takes the last one's place; "results"
            when the checkpoint of the end is written, and the results are not.
        signal: which; any other than SIGKILL goes to the whole group of processes, loading ones included.
    """

    def __init__(self, step, moment="step", signal="SIGKILL"):
        self.step, self.moment, self.signal = step, moment, signal

    def strike(self, trainer, moment, step):
        if trainer.is_global_zero and moment == self.moment and step == self.step:
            if self.signal == "SIGKILL":
                os.kill(os.getpid(), signal.SIGKILL)
            signal_group(self.signal)

    def on_before_backward(self, trainer, pl_module, loss):
        self.strike(trainer, "step", trainer.global_step + 1)

    def on_validation_batch_end(self, trainer, *args):
        self.strike(trainer, "validation", trainer.global_step)

    def on_fit_end(self, trainer, pl_module):
        self.strike(trainer, "results", trainer.global_step)

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step != self.step:
            return
        if self.moment == "write":
            write = torch.save

            def half(content, file):
                write(content, file)
                if self.signal != "SIGKILL":
                    torch.save = write
                    signal_group(self.signal)
                    return
                file.truncate(file.tell() // 2)
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            torch.save = half
        if self.moment == "rename":
            resume._link = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)


def signal_group(name):
    """Signal this process's group as a terminal, `timeout` or SLURM would: from outside."""
    command = ["kill", f"-{name.removeprefix('SIG')}", "--", f"-{os.getpgrp()}"]
    subprocess.run(command, check=True, start_new_session=True)


def kill(step, moment="step", signal="SIGKILL"):
    """Arguments of train.py."""
    keys = {"_target_": "tests.training.killing.Kill", "step": step, "moment": moment, "signal": signal}
    return [f"+callbacks.kill.{key}={value}" for key, value in keys.items()]


def survive():
    """Arguments of train.py that render the callback harmless, which a resumed run takes over from the killed one."""
    return ["+callbacks.kill.step=-1"]


def flat(content, name=""):
    """All values in nested containers by their paths."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in items:
        if isinstance(value, dict | list | tuple):
            yield from flat(value, f"{name}/{key}")
        else:
            yield f"{name}/{key}", value


def state(path):
    """Everything in a checkpoint that does not say where it lies or how it was called.

    Without the score of the last validation that a `ModelCheckpoint` saved: nobody reads it, and Lightning does not
    restore it.
    """
    content = torch.load(path, weights_only=True)
    del content["pem_lightning"]
    for callback in content["callbacks"].values():
        for key in ("dirpath", "best_model_path", "kth_best_model_path", "last_model_path", "current_score"):
            callback.pop(key, None)
        if "best_k_models" in callback:
            callback["best_k_models"] = {Path(k).name: v for k, v in callback["best_k_models"].items()}
    return dict(flat(content))


def differences(a, b):
    """Names of what differs in any bit."""

    def same(x, y):
        if isinstance(x, torch.Tensor):
            return x.dtype == y.dtype and x.numpy().tobytes() == y.numpy().tobytes()
        return x == y

    return sorted(k for k in a.keys() | b.keys() if not (k in a and k in b and same(a[k], b[k])))
