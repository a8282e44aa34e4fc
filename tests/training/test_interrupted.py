"""A training that is killed, stopped, or runs into trouble, and goes on: it ends as if nothing had happened."""

import json
import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from lightning import Callback

from pem_lightning.callbacks.visualization import log_files, read_metrics
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.data import CachedDataset, synthetic
from tests.jobs import TINIEST, call, exit_code, in_child, in_group, run
from tests.training.killing import differences, kill, signal_group, state, survive

pytestmark = pytest.mark.slow

# Nine images make four batches: checkpoints and validations are in the middle of epochs and at their ends.
RUN = (
    *TINIEST,
    "dataset.datamodule.num_train=9",
    "recipe.max_steps=7",
    "recipe.val_interval=3",
    "recipe.checkpoint_interval=2",
    "recipe.ema_decay=0.5",
)


@pytest.fixture(scope="module")
def whole(work):
    """Folder of a run that nothing happened to."""
    assert call("train", *RUN, "hydra.run.dir=whole") == 0  # here, which leaves the imports for all others
    return work / "whole"


def assert_the_same(whole, run):
    for name in ("last.ckpt", "last-previous.ckpt", "best.ckpt"):
        assert differences(state(whole / "checkpoints" / name), state(run / "checkpoints" / name)) == []
    for name in ("metrics.json", "per_class.csv"):
        assert (whole / name).read_text() == (run / name).read_text()
    metrics = read_metrics(log_files(run / "csv"))
    assert metrics == read_metrics(log_files(whole / "csv"))
    assert [step for step, _ in metrics["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in metrics["val/PQ"]] == [3, 6, 7]
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last-previous.ckpt", "last.ckpt"}
    assert list(run.rglob("*.tmp")) == []


def test_a_training_that_is_killed_again_and_again_ends_as_if_it_had_not_been(whole, capfd):
    """SIGKILL at every kind of moment; the same command starts and resumes it."""
    command = (*RUN, "hydra.run.dir=killed", "resume=auto")
    moments = [(1, "step"), (3, "validation"), (4, "write"), (5, "step"), (6, "rename"), (7, "results")]
    for step, moment in moments:
        assert in_child(*command, *kill(step, moment)) == 128 + signal.SIGKILL, (step, moment)
    assert in_child(*command, *survive()) == 0
    assert_the_same(whole, Path("killed"))
    assert in_child(*command) == 0
    assert "trained to step 7 of 7 already: nothing to do" in capfd.readouterr().out


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """A job of a SLURM that writes into a file what it is asked."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "0"}
    with monkeypatch.context() as patch:
        for name, value in job.items():
            patch.setenv(name, value)
        yield tmp_path / "asked"


def test_signals_to_all_processes_save_and_say_how_to_go_on(whole, slurm, capfd):
    """With loading processes; SLURM is asked to queue the job again, and the job's own command goes on."""
    command = (*RUN, "hydra.run.dir=stopped", "dataset.num_workers=2")
    last = Path("stopped").absolute() / "checkpoints" / "last.ckpt"
    assert in_child(*command, "resume=auto", *kill(1, signal="SIGUSR1")) == 138
    assert slurm.read_text() == "requeue 77\n"
    assert read_checkpoint(last).step == 1
    assert in_child(*command, "resume=auto", *kill(3, "validation", signal="SIGTERM")) == 143
    assert read_checkpoint(last).step == 3
    printed = capfd.readouterr()
    assert f"stopped by SIGTERM at step 3; to go on: python train.py resume={last}" in printed.out
    assert in_child(f"resume={last}", *kill(4, "write", signal="SIGTERM")[1:]) == 143
    assert read_checkpoint(last).step == 5  # the step that followed the checkpoint
    assert in_child(f"resume={last}", *kill(6, signal="SIGINT")[1:]) == 130
    assert read_checkpoint(last).step == 6
    assert "Traceback" not in printed.err + capfd.readouterr().err
    assert in_child(f"resume={last}", *survive()) == 0
    assert_the_same(whole, Path("stopped"))
    assert "dataset.num_workers=2" in Path("stopped/.hydra/overrides.yaml").read_text()


def test_a_warning_of_slurm_comes_in_a_validation_or_while_a_checkpoint_is_written(whole, slurm, capfd):
    command = (*RUN, "hydra.run.dir=warned", "dataset.num_workers=2", "resume=auto")
    last = Path("warned").absolute() / "checkpoints" / "last.ckpt"
    for moment, begun, saved in (("validation", 3, 3), ("write", 4, 5)):
        assert in_child(*command, *kill(begun, moment, signal="SIGUSR1")) == 138
        assert read_checkpoint(last).step == saved
    assert slurm.read_text() == "requeue 77\n" * 2
    assert in_child(*command, *survive()) == 0
    assert_the_same(whole, Path("warned"))
    assert "Traceback" not in capfd.readouterr().err


def test_tasks_of_slurm_stop_together_and_ask_once(work, slurm, capfd):
    """Two processes as srun starts them, in one group."""
    arguments = ("trainer.devices=2", "trainer.strategy=ddp", "recipe.global_batch_size=4", "dataset.num_workers=2")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    tasks = []
    for rank in ("0", "1"):
        environment = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
        environment.update(SLURM_NODEID="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = (*RUN, *arguments, "hydra.run.dir=tasks", *kill(4, signal="SIGUSR1"))
        tasks.append(in_group(run, "train", command, environment, group=tasks[0] if tasks else 0))
        while os.getpgid(tasks[0]) != tasks[0]:
            time.sleep(0.01)
    assert list(map(exit_code, tasks)) == [138, 138]
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    step = read_checkpoint("tasks/checkpoints/last.ckpt").step
    assert step in (4, 5)  # the processes agree on one after the next step at the latest
    assert out.count(f"stopped by SIGUSR1 at step {step}") == 1
    assert slurm.read_text() == "requeue 77\n"


def test_signals_before_the_first_step_leave_nothing_half_made(work, slurm, capfd, monkeypatch):
    """While scenes are drawn, and while loading processes copy them into the cache; the next start goes on."""
    command = (*RUN, "dataset.root=streets", "dataset.num_workers=2", "dataset.cache=cache", "recipe.max_steps=1")
    command = (*command, "hydra.run.dir=early")
    with monkeypatch.context() as patch:
        write = synthetic._write_sample
        patch.setattr(synthetic, "_write_sample", lambda *a: signal_group("SIGTERM") if a[2] == 4 else write(*a))
        assert in_child(*command) == 143
    assert not list(work.glob("*streets*"))
    with monkeypatch.context() as patch:
        copy = CachedDataset.copy

        def interrupt(name):  # and wait for the end: else this worker may copy the rest before the job stops it
            signal_group(name)
            time.sleep(60)

        patch.setattr(CachedDataset, "copy", lambda *a: interrupt("SIGUSR1") if a[1] == 4 else copy(*a))
        assert in_child(*command) == 138
        assert slurm.read_text() == "requeue 77\n"
        patch.setattr(CachedDataset, "copy", lambda *a: interrupt("SIGINT") if a[1] == 6 else copy(*a))
        assert in_child(*command) == 130
    assert len(list(work.glob("cache/*/*.json"))) in range(5, 9)  # the two processes are not in step
    assert in_child(*command) == 0
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_ends_an_evaluation_in_order(whole, capfd):
    command = ("checkpoint=whole/checkpoints/best.ckpt", "dataset.num_workers=2", "hydra.run.dir=evaluated")
    assert in_child(*command, *kill(0, "validation", signal="SIGINT"), job="evaluate") == 130
    assert "Traceback" not in capfd.readouterr().err


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(whole, capfd):
    shutil.copytree(whole, "damaged")
    last, previous = (Path("damaged/checkpoints") / name for name in ("last.ckpt", "last-previous.ckpt"))
    last.write_bytes(last.read_bytes()[:-5000])
    step = read_checkpoint(previous).step
    assert step == 6
    assert in_child(*RUN, "resume=last", "hydra.run.dir=damaged") == 0
    assert f"is damaged (File is not a zip file); GOING ON FROM {previous}" in capfd.readouterr().err
    for name in ("last.ckpt", "best.ckpt"):
        assert differences(state(whole / "checkpoints" / name), state(Path("damaged/checkpoints") / name)) == []
    last.write_bytes(b"")
    previous.write_bytes(b"rubbish")
    assert in_child(*RUN, f"resume={last}") == 2
    assert "error: neither can be resumed" in capfd.readouterr().err


class Poison(Callback):
    """Makes the losses of one step NaN, and the statistics of the step's forward pass useless.

    Args:
        step: counted from 1.
        rank: the process in which it happens.
    """

    def __init__(self, step, rank=0):
        self.step, self.rank = step, rank

    def on_train_start(self, trainer, pl_module):
        def poison(criterion, arguments, losses):
            if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
                for buffer in pl_module.network.buffers():
                    buffer.data.fill_(torch.nan if buffer.is_floating_point() else 0)
                return {name: loss * torch.nan for name, loss in losses.items()}
            return losses

        pl_module.criterion.register_forward_hook(poison)


def poison(step, rank=0):
    path = f"{__name__}.Poison"
    return [f"+callbacks.poison.{k}={v}" for k, v in {"_target_": path, "step": step, "rank": rank}.items()]


SHORT = (*RUN, "recipe.max_steps=2", "recipe.val_interval=2", "recipe.checkpoint_interval=1")


def test_a_loss_that_is_not_finite_stops_the_training_and_leaves_what_led_to_it(work, capfd):
    assert in_child(*SHORT, *poison(2), "hydra.run.dir=poisoned") == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    dump = Path("poisoned").absolute() / "non_finite_step_000002.pt"
    assert "the loss of step 2 is not finite (images drawn" in line
    assert str(dump) in line
    assert read_checkpoint("poisoned/checkpoints/last.ckpt").step == 1
    content = torch.load(dump, weights_only=True)
    assert content["step"] == 2
    assert all(Path(file).is_file() for file in content["files"])
    assert [tuple(image.shape) for image in content["images"]] == [(3, 64, 128)] * 2
    assert [len(labels) for labels in content["labels"]] == [len(masks) for masks in content["masks"]]
    assert content["losses"]["train/loss"].isnan()
    assert len(content["names"]) == 2


def test_steps_that_are_not_finite_are_skipped_if_that_is_wanted(work, capfd):
    assert in_child(*SHORT, *poison(2), "recipe.max_bad_steps=1", "hydra.run.dir=skipped") == 0
    assert "SKIPPED, 1 of at most 1" in capfd.readouterr().out
    before, after = (state(f"skipped/checkpoints/{name}.ckpt") for name in ("last-previous", "last"))
    assert (before["/global_step"], after["/global_step"]) == (1, 2)
    assert after["/callbacks/NonFiniteLoss/bad_steps"] == 1
    changed = differences(before, after)
    assert not [name for name in changed if name.startswith(("/current_model_state", "/optimizer_states/0/state"))]
    assert any(name.startswith("/lr_schedulers") for name in changed)
    assert all(value.isfinite().all() for name, value in after.items() if name.startswith("/state_dict"))  # the average
    assert read_metrics([Path("skipped/csv/metrics.csv")])["train/bad_steps"] == [(2, 1.0)]


class SmallFiles(Callback):
    """From step 2 on, when the first checkpoint is there, no file can grow beyond a size, as on a full disk."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))


def test_a_full_disk_keeps_the_old_checkpoint_and_ends_in_one_line(work, capfd):
    full = f"+callbacks.full._target_={__name__}.SmallFiles"
    assert in_child(*SHORT, full, "recipe.max_steps=3", "hydra.run.dir=full") == 2
    printed = capfd.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert "could not be written (File too large): make room, and resume" in line
    assert printed.out.count("CANNOT WRITE") > 1  # each time
    assert read_checkpoint("full/checkpoints/last.ckpt").step == 1
    assert list(Path("full").rglob("*.tmp")) == []
    assert json.loads(Path("full/metrics.json").read_text())["step"] == 3


def test_two_processes_agree_on_what_one_of_them_meets(work, capfd):
    """NaN in one of them is skipped by both; a signal to all stops both after the same step; they resume."""
    devices = ("trainer.devices=2", "trainer.strategy=ddp", "dataset.num_workers=2")
    arguments = (*RUN, "recipe.global_batch_size=4", *devices)
    own = ("recipe.max_bad_steps=1", "hydra.run.dir=two")
    assert in_child(*arguments, *own, *poison(2, rank=1), *kill(4, signal="SIGTERM")) == 143
    out, err = capfd.readouterr()
    assert "Traceback" not in err
    last = work / "two" / "checkpoints" / "last.ckpt"
    assert out.count("SKIPPED, 1 of at most 1") == 2
    step = read_checkpoint(last).step
    assert f"stopped by SIGTERM at step {step}" in out
    assert len(list((work / "two").glob("non_finite_step_000002_device_[01].pt"))) == 2
    limits = (f"recipe.max_steps={step + 3}", "recipe.val_interval=1")
    assert in_child(f"resume={last}", *limits, *kill(step + 1, "validation", signal="SIGINT")[1:]) == 130
    before, step = step, read_checkpoint(last).step
    assert step in (before + 1, before + 2)  # they agree on it after the next step at the latest
    limits = (f"recipe.max_steps={step + 1}", "recipe.val_interval=1")
    assert in_child(f"resume={last}", *limits, *survive()) == 0
    assert json.loads((work / "two" / "metrics.json").read_text())["step"] == step + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resume=auto"], "say hydra.run.dir=outputs/... as well"),
        (["resume=whole/checkpoints/last.ckpt", "seed=5"], "leave seed=5 out"),
        (["hydra.run.dir=whole/metrics.json/run"], "metrics.json: Not a directory): choose another output folder"),
    ],
)
def test_mistakes(whole, arguments, message, capsys):
    assert call("train", *RUN, *arguments) == 2
    assert message in capsys.readouterr().err
