"""TensorBoard's table of runs and their settings: what a run writes about itself, and how runs are compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pem_lightning.callbacks.loggers import flat

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
