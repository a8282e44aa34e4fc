"""What a run tells its trackers besides scalars. Every such call of a tracker passes through this module."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from pem_lightning.callbacks.safe_loggers import Guarded
from pem_lightning.callbacks.shown import Pictures, Shown
from pem_lightning.types import DatasetInfo


class RunStart(NamedTuple):
    """What is known of a run when it starts.

    Attributes:
        config: the composed experiment, plain data.
        overrides: the command line's part of it.
        monitor: the logged name of the task's metric.
        step: training steps that are done; more than 0 in a resumed run.
    """

    config: Mapping[str, Any]
    overrides: Sequence[str]
    monitor: str
    step: int


class Panel(NamedTuple):
    """One image's prediction.

    Attributes:
        name: the image's.
        what: image, truth and prediction.
        pictures: the three of them drawn.
    """

    name: str
    what: Shown
    pictures: Pictures


class Tracker(ABC):
    """A logger of Lightning's that takes more than scalars. Steps are numbers of training steps that are done."""

    @abstractmethod
    def record_start(self, start: RunStart) -> None:
        """Show how the experiment is configured."""

    @abstractmethod
    def record_panel(self, panel: Panel, info: DatasetInfo, step: int) -> None:
        """Show a prediction; the tracker keeps those of earlier validations."""

    @abstractmethod
    def record_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Show a table; the tracker keeps those of earlier validations."""

    @abstractmethod
    def record_picture(self, name: str, picture: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Show a picture."""

    def closing_words(self) -> tuple[str, str] | None:
        """What the user may want to do with the tracked run: a word and a command."""
        return None


def record_start(loggers: Iterable[Logger], start: RunStart) -> None:
    """Tell a trainer's trackers how the experiment is configured, before anything is logged."""
    _tell(loggers, lambda tracker: tracker.record_start(start))


def record_panel(loggers: Iterable[Logger], panel: Panel, info: DatasetInfo, step: int) -> None:
    """Tell a trainer's trackers a prediction."""
    _tell(loggers, lambda tracker: tracker.record_panel(panel, info, step))


def record_table(loggers: Iterable[Logger], name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Tell a trainer's trackers a table: rows with the same keys."""
    _tell(loggers, lambda tracker: tracker.record_table(name, rows, step))


def record_picture(
    loggers: Iterable[Logger], name: str, picture: UInt8[np.ndarray, "height width 3"], step: int
) -> None:
    """Tell a trainer's trackers a picture, RGB."""
    _tell(loggers, lambda tracker: tracker.record_picture(name, picture, step))


def closing_words(loggers: Iterable[Logger]) -> list[tuple[str, str]]:
    """What the user may want to do with the tracked run, as words and commands."""
    words: list[tuple[str, str]] = []

    def ask(tracker: Tracker) -> None:
        if (said := tracker.closing_words()) is not None:
            words.append(said)

    _tell(loggers, ask)
    return words


@rank_zero_only
def _tell(loggers: Iterable[Logger], what: Callable[[Tracker], None]) -> None:
    """Loggers that are no trackers, such as the csv file, have scalars only."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            with logger.guard() if isinstance(logger, Guarded) else nullcontext():
                what(logger)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by names such as `recipe.optimizer.lr`."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def readable(path: Path) -> str:
    """A path as it is typed: from the current folder on, if it is in there."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)
