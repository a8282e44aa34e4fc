"""Reading what train.py left behind: the experiment and its csv log, of finished and of unfinished runs."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pem_lightning.callbacks.visualization import Series, log_files, read_metrics
from pem_lightning.types import UserError

log = logging.getLogger(__name__)

_PARTS = ("task", "dataset", "backbone", "recipe", "network", "criterion", "inference")
"""Of the experiment; the others (loggers, callbacks) say nothing about the result and refer to Hydra's own values."""


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        path: its folder.
        seed: of the random numbers.
        max_steps: how many it is meant to take.
        config: the parts of the experiment that decide about the result, resolved.
        written: the same with interpolations as they were written.
        choices: Hydra's groups -> the chosen options.
        overrides: the command line's part of the experiment.
        series: everything that was logged, metric -> (steps done, value) by rising step; metrics are in percent.
        step: how many steps are known to be done.
        weights: what it started from, None for random weights.
    """

    path: Path
    seed: int
    max_steps: int
    config: dict[str, Any]
    written: dict[str, Any]
    choices: dict[str, Any]
    overrides: tuple[str, ...]
    series: Series
    step: int
    weights: str | None = None

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return str(self.config["dataset"]["name"])

    @property
    def task(self) -> str:
        """semantic, panoptic or instance."""
        return str(self.config["task"]["name"])

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        name = self.config["network"].get("backbone")
        return name if isinstance(name, str) else str(self.config["backbone"]["name"])

    @property
    def metric(self) -> str:
        """The task's main metric: PQ, mIoU or AP."""
        return str(self.config["task"]["monitor"]).removeprefix("val/")

    @property
    def finished(self) -> bool:
        """Whether it took all its steps."""
        return self.step >= self.max_steps

    def validations(self, metric: str) -> dict[int, float]:
        """Steps done -> the metric in percent, by rising step; what is not a number is left out.

        Args:
            metric: as the log calls it, but for its `val/`: "PQ", "PQ_things", "mIoU", "AP50", ...
        """
        return {step: value for step, value in self.series.get(f"val/{metric}", []) if not math.isnan(value)}

    @property
    def progress(self) -> str:
        """Such as "600 steps" or "180 of 600 steps"."""
        return f"{self.max_steps} steps" if self.finished else f"{self.step} of {self.max_steps} steps"


def read_runs(paths: Iterable[str | Path], say: Callable[[str], None] = log.warning) -> list[Run]:
    """Read training runs.

    Args:
        paths: folders of runs, or folders that hold such at any depth. What is no training run is passed over.
        say: is told, in one line, of every run that cannot be read, which is then left out.

    Returns:
        In the order of the paths and, below each, of the folders' names.

    Raises:
        UserError: a path does not exist, or there is no run at all.
    """
    folders: dict[Path, None] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give runs of train.py, or folders that hold some")
        folders |= dict.fromkeys(_run_folders(path))
    runs, broken = [], 0
    for folder in folders:
        try:
            run = _read_run(folder)
        except (UserError, OmegaConfBaseException, YAMLError, OSError, ValueError, KeyError, TypeError) as error:
            broken += 1
            say(f"skipped {folder}: {_one_line(error)}")
        else:
            runs += [] if run is None else [run]
    if not runs:
        found = f"{broken} of them broken" if broken else "none"
        raise UserError(f"there is no training run in {', '.join(map(str, paths))} ({found}): start one with train.py")
    return runs


def parts_of(config: DictConfig, resolve: bool) -> dict[str, Any]:
    """The parts of an experiment that decide about the result, as plain containers."""
    return {part: OmegaConf.to_container(config[part], resolve=resolve) for part in _PARTS}


def _run_folders(path: Path) -> Iterator[Path]:
    if (path / ".hydra" / "config.yaml").is_file():
        yield path
        return
    found = [config.parent.parent for config in path.rglob(".hydra/config.yaml")]
    yield from sorted(found, key=lambda folder: [_natural(part) for part in folder.relative_to(path).parts])


def _natural(text: str) -> list[tuple[int, str]]:
    """Sorts "2" before "10"."""
    return [(int(digits or 0), other) for digits, other in re.findall(r"(\d+)|(\D+)", text)]


def _read_run(folder: Path) -> Run | None:
    """Read one run; None if it is another job than training."""
    config = OmegaConf.load(folder / ".hydra" / "config.yaml")
    if not isinstance(config, DictConfig):
        raise UserError(".hydra/config.yaml is no experiment")
    if config.get("job") != "train":
        return None
    _rename_old_keys(config)
    logs = log_files(folder / "csv")
    if not any(path.is_file() for path in logs):
        raise UserError("it has no log, csv/metrics.csv; its run.log may say why")
    series = read_metrics(logs)
    return Run(
        path=folder,
        seed=int(config.seed),
        max_steps=int(config.trainer.max_steps),
        config=parts_of(config, resolve=True),
        written=parts_of(config, resolve=False),
        choices=_choices(folder),
        overrides=_overrides(folder),
        series=series,
        step=_last_step(folder, series),
        weights=None if config.get("weights") is None else str(config.weights),
    )


def _rename_old_keys(config: DictConfig) -> None:
    """Bring the configuration of a run from before `global_batch_size` to today's names."""
    if "batch_size" in config.recipe:
        config.recipe.global_batch_size = config.recipe.pop("batch_size")
        config.dataset.datamodule.batch_size = "${recipe.global_batch_size}"


def _choices(folder: Path) -> dict[str, Any]:
    path = folder / ".hydra" / "hydra.yaml"
    if not path.is_file():
        return {}
    return dict(OmegaConf.load(path).hydra.runtime.choices)


def _overrides(folder: Path) -> tuple[str, ...]:
    path = folder / ".hydra" / "overrides.yaml"
    return tuple(map(str, OmegaConf.load(path))) if path.is_file() else ()


def _last_step(folder: Path, series: Series) -> int:
    """The log has every so many steps only; a run that came to its end has written the last."""
    logged = [points[-1][0] for name, points in series.items() if name.startswith(("train/", "val/"))]
    metrics = folder / "metrics.json"
    end = int(json.loads(metrics.read_text())["step"]) if metrics.is_file() else 0
    return max([end, *logged])


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"it is broken ({type(error).__name__}: {text[:200]})"
