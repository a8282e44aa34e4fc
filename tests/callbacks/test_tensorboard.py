"""Event files, read back with TensorBoard's own reader."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    EXPERIMENT_TAG,
    SESSION_START_INFO_TAG,
    parse_experiment_plugin_data,
    parse_session_start_info_plugin_data,
)

from pem_lightning.callbacks.loggers import Panel, RunStart, experiment, settings_of, title_of
from pem_lightning.callbacks.shown import draw_pictures, shown
from pem_lightning.callbacks.tensorboard import MAX_WIDTH, TensorBoard

CONFIG = {
    "output_dir": "somewhere",
    "seed": 3,
    "recipe": {"optimizer": {"_target_": "AdamW", "lr": 1e-3}, "flip": True, "sizes": [1, 2], "cache": None},
}


def start(step=0):
    return RunStart(CONFIG, ["seed=3"], "val/PQ", step)


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def text_of(accumulator, tag):
    return [event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(f"{tag}/text_summary")]


@pytest.fixture
def logger(tmp_path):
    return TensorBoard(tmp_path)


def test_scalars_by_steps_that_are_done(logger, tmp_path):
    logger.record_start(start())
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, 9)
    logger.save()
    logger.finalize("success")
    events = read(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.0)]
    assert events.Tags()["scalars"] == ["train/loss"]
    # Directly in the run's folder, whose name is the run's; and nothing else.
    assert [path.name.split(".")[0] for path in tmp_path.iterdir()] == ["events"]


def test_the_configuration_is_a_row_and_a_text(logger, tmp_path):
    logger.record_start(start())
    logger.finalize("success")
    events = read(tmp_path)
    content = events.SummaryMetadata(SESSION_START_INFO_TAG).plugin_data.content
    session = parse_session_start_info_plugin_data(content)
    assert session.group_name.startswith(tmp_path.name)
    row = session.hparams
    assert row["recipe.optimizer.lr"].number_value == 1e-3
    assert row["seed"].number_value == 3
    assert row["recipe.sizes"].string_value == "[1, 2]"
    assert row["recipe.cache"].string_value == "None"
    assert "output_dir" not in row
    assert EXPERIMENT_TAG not in events.Tags()["tensors"]  # the first one would be taken for all runs
    assert text_of(events, "overrides") == ["    seed=3"]
    assert "        lr: 0.001" in text_of(events, "config")[0].splitlines()
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_pictures_and_tables_of_every_validation(logger, tmp_path, sample, result, info):
    what = shown(sample, result, info)
    panel = Panel("a", what, draw_pictures(what, info))
    rows = [
        {"class": "a|b", "kind": "thing", "PQ": 12.34, "TP": 3},
        {"class": "c", "kind": "stuff", "PQ": float("nan"), "TP": 0},
    ]
    for step in (5, 10):
        logger.record_panel(panel, info, step)
        logger.record_table("val/per_class", rows, step)
    logger.record_picture("wide", np.zeros((100, 2 * MAX_WIDTH, 3), np.uint8), 5)
    logger.finalize("success")
    events = read(tmp_path)
    pictures = events.Images("panels/a")
    assert [picture.step for picture in pictures] == [5, 10]
    height, width = panel.pictures["image"].shape[:2]
    assert (pictures[0].width, pictures[0].height) == (width, 3 * height + 2 * 4)
    drawn = np.array(Image.open(io.BytesIO(pictures[0].encoded_image_string)))
    assert np.array_equal(drawn[-height // 2 :], panel.pictures["prediction"][-height // 2 :])
    assert (events.Images("wide")[0].width, events.Images("wide")[0].height) == (MAX_WIDTH, 50)
    first, second = text_of(events, "val/per_class")
    assert first == second
    assert first.splitlines() == [
        "| class | kind | PQ | TP |",
        "| --- | --- | --: | --: |",
        "| a/b | thing | 12.3 | 3 |",
        "| c | stuff | - | 0 |",
    ]


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    for begin, value in ((0, 1.0), (2, 2.0)):
        logger = TensorBoard(tmp_path, filename_suffix=f".{begin}")
        logger.record_start(start(begin))
        for step in range(begin, begin + 4):
            logger.log_metrics({"loss": value}, step)
        logger.finalize("success")
    found = [(event.step, event.value) for event in read(tmp_path).Scalars("loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_columns_are_what_differs_first():
    one = settings_of({**CONFIG, "network": {"num_points": "${recipe.num_points}"}})
    other = settings_of({**CONFIG, "seed": 4, "network": {"csm": False, "num_points": "${recipe.num_points}"}})
    content = experiment([one, other], ["val/PQ"]).value[0].metadata.plugin_data.content
    table = parse_experiment_plugin_data(content)
    columns = {column.name: column.differs for column in table.hparam_infos}
    assert {name for name, differs in columns.items() if differs} == {"seed", "network.csm"}
    assert "recipe.optimizer.lr" in columns
    assert not {"recipe.optimizer._target_", "network.num_points", "output_dir"} & columns.keys()
    assert [metric.name.tag for metric in table.metric_infos] == ["val/PQ"]


@pytest.mark.parametrize(
    ("run", "title"),
    [
        ("/a/outputs/set/train_2026-11-26_18-30-59", "11-26_18-30-59 train_2026-11-26_18-30-59 a/outputs/set"),
        ("/multirun/sweep/2026-11-26/0_seed-0", "0_seed-0 multirun/sweep/2026-11-26"),
    ],
)
def test_the_beginning_of_a_title_tells_runs_apart(run, title):
    assert title_of(Path(run)) == title
