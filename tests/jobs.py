"""How tests run the commands: here or in a copy of this process, which spares the imports."""

import logging
import os
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import jaxtyping
import torch
from omegaconf import DictConfig, open_dict

from pem_lightning.cli import errors, launch

ROOT = Path(__file__).parents[1]

DRAWN = (
    "dataset.root=drawn",
    "dataset.datamodule.height=64",
    "dataset.datamodule.width=128",
    "dataset.num_workers=0",
    "recipe.global_batch_size=2",
    "recipe.num_points=64",
    "recipe.train_transform.crop_size=[64,128]",
    "recipe.train_transform.shortest_edges=[64]",
    "trainer=cpu",
)
"""Arguments of train.py for small images that it draws in the current folder."""

TINY = (
    *DRAWN,
    "dataset.datamodule.num_train=8",
    "dataset.datamodule.num_val=3",
    "backbone.module={_target_:tests.models.randomize.TinyBackbone}",
    "network.num_layers=2",
    "network.num_queries=20",
    "network.channels=32",
    "network.hidden_channels=32",
    "network.mask_channels=32",
    "network.pyramid_channels=32",
    "task.inference.object_mask_threshold=0.05",
    "task.inference.overlap_threshold=0.05",
    "trainer.log_every_n_steps=1",
)
"""Arguments of train.py for a run of seconds on them, with a backbone of four convolutions."""

TINIEST = (
    *TINY,
    "dataset.datamodule.num_val=2",
    "logger=csv",
    "callbacks.throughput=null",
    "callbacks.panels=null",
    "callbacks.curves=null",
    "callbacks.confusion=null",
)
"""The same without pictures."""


def call(job: str, *arguments: str) -> int:
    """Run a job as its entry point does; returns the exit code."""
    before = sys.argv
    sys.argv = [str(ROOT / f"{job}.py"), *arguments]
    try:
        launch.main(job)
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before
    return 0


def in_child(*arguments, job="train"):
    """Run a job in a copy of this process, in a group of its own; returns what the shell would call its exit code."""
    return exit_code(in_group(run, job, arguments))


def run(job, arguments, environment=()):
    """A job in a process that `in_group` has started."""
    os.environ.update(environment)
    torch.set_num_threads(1)  # the parent's other threads have not come along
    sys.modules["__main__"].__spec__ = None  # with more devices, Lightning starts sys.argv and not pytest
    return call(job, *arguments)


def in_group(function, *arguments, group=0):
    """Start a function in a copy of this process, in a group of its own or in a given one; returns its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, group)
            code = function(*arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def exit_code(child):
    """Wait for a process; returns what the shell would call its exit code."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - code if code < 0 else code


@contextmanager
def unchecked_shapes():
    """For export: tracing replaces lengths by symbols, which are no whole numbers.

    PyTorch's structured log of what it traces, which pytest would collect, takes as long as the tracing.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    log = logging.getLogger("torch.__trace")
    handlers, log.handlers = log.handlers, []
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
        log.handlers = handlers


def compose(job: str = "train", *overrides: str) -> DictConfig:
    """The experiment without Hydra's own part."""
    cfg = errors.compose(job, ["output_dir=unused", *overrides])
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
