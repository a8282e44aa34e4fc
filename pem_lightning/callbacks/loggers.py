"""What a run tells its trackers besides scalars. Every such call of a tracker passes through this module."""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import CSVLogger, Logger

from pem_lightning.callbacks.shown import Pictures, Shown
from pem_lightning.types import DatasetInfo, UserError


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


log = logging.getLogger(__name__)


class Guarded:
    """Mixed into a logger, keeps its errors from ending the training. The first of them is logged as a warning.

    For calls of a tracker's own (`logger.experiment....`) there is `with logger.guard():`.
    """

    _complained = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Log an error instead of raising it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # trackers raise whatever their network, server or disk does
            if not self._complained:
                self._complained = True
                reason = " ".join(str(error).split()) or "no message"
                log.warning(
                    "%s LOSES NUMBERS (%s: %s): training goes on, and says no more about it",
                    type(self).__name__,
                    type(error).__name__,
                    reason,
                )

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log numbers."""
        self._safely(super().log_metrics, *args, **kwargs)  # type: ignore[misc]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log the configuration."""
        self._safely(super().log_hyperparams, *args, **kwargs)  # type: ignore[misc]

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        """Log pictures, where the tracker can."""
        self._safely(super().log_image, *args, **kwargs)  # type: ignore[misc]

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table, where the tracker can."""
        self._safely(super().log_table, *args, **kwargs)  # type: ignore[misc]

    def save(self) -> None:
        """Write what is buffered."""
        self._safely(super().save)  # type: ignore[misc]

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload a checkpoint, where that is wanted."""
        self._safely(super().after_save_checkpoint, checkpoint_callback)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        """Close."""
        self._safely(super().finalize, status)  # type: ignore[misc]

    def _safely(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with self.guard():
            call(*args, **kwargs)


class SafeCSVLogger(Guarded, CSVLogger):
    """Lightning's csv log, guarded."""


if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

COMPARED = ("seed", "task", "dataset", "backbone", "recipe", "network", "criterion", "inference", "trainer", "weights")
"""Parts of an experiment; the others say where results go."""


Settings = Mapping[str, int | float | str]
"""By names such as `recipe.optimizer.lr`; what is no number is text."""


def settings_of(config: Mapping[str, Any]) -> Settings:
    """An experiment's settings that are compared.

    Args:
        config: a composed experiment as plain data, resolved or not.
    """
    parts = {name: config[name] for name in COMPARED if name in config}
    # TensorBoard would show True as 1.0000.
    return {name: value if type(value) in (int, float) else str(value) for name, value in flat(parts)}


def title_of(run: Path) -> str:
    """A run's unique name in the table, which shows its first fifteen characters: `11-26_18-30-59 train_2026-... ...`.

    Args:
        run: its folder.
    """
    *parents, name = run.resolve().parts[-4:]
    begin = re.sub(r"^\w+_\d{4}-(\d\d-\d\d_\d\d-\d\d-\d\d)$", r"\1 \g<0>", name)
    return " ".join([begin, "/".join(parents)])


def session(title: str, settings: Settings) -> list[Summary]:
    """What a run writes: a row of the table, without the columns (see `experiment`).

    TensorBoard would take the columns of one run for those of all.
    """
    from tensorboard.plugins.hparams.api_pb2 import STATUS_SUCCESS
    from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
    from tensorboard.plugins.hparams.plugin_data_pb2 import SessionEndInfo, SessionStartInfo

    start = SessionStartInfo(group_name=title)
    for name, value in settings.items():
        if isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    end = SessionEndInfo(status=STATUS_SUCCESS)
    return [
        _summary(SESSION_START_INFO_TAG, session_start_info=start),
        _summary(SESSION_END_INFO_TAG, session_end_info=end),
    ]


def experiment(runs: Sequence[Settings], metrics: Iterable[str]) -> Summary:
    """The table's columns. Those in which runs differ come first, and are shown at first sight.

    Args:
        runs: settings of every run. Interpolations (`${...}`) are no columns: a difference is shown where it is said.
        metrics: logged names.
    """
    from tensorboard.plugins.hparams.api_pb2 import (
        DATA_TYPE_FLOAT64,
        DATA_TYPE_STRING,
        Experiment,
        HParamInfo,
        MetricInfo,
        MetricName,
    )
    from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG

    columns = []
    for name in dict.fromkeys(name for settings in runs for name in settings):
        values = {settings.get(name, "None") for settings in runs}
        differs = len(values) > 1
        if not differs and (name.endswith("_") or any(str(value).startswith("${") for value in values)):
            continue  # _target_, _partial_
        kind = DATA_TYPE_STRING if any(isinstance(value, str) for value in values) else DATA_TYPE_FLOAT64
        columns.append(HParamInfo(name=name, type=kind, differs=differs))
    infos = [MetricInfo(name=MetricName(tag=name)) for name in metrics]
    return _summary(EXPERIMENT_TAG, experiment=Experiment(hparam_infos=columns, metric_infos=infos))


def _summary(tag: str, **data: Any) -> Summary:
    """What the table is made of: a summary without a value, which has its data in its description."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.plugins.hparams.metadata import PLUGIN_DATA_VERSION, PLUGIN_NAME
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = HParamsPluginData(version=PLUGIN_DATA_VERSION, **data).SerializeToString()
    about = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content)
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=about))])
