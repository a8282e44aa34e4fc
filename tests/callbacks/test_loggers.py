"""The one place where trackers are told things."""

from unittest.mock import MagicMock

import numpy as np
from lightning.pytorch.loggers import CSVLogger

from pem_lightning.callbacks.loggers import (
    RunStart,
    closing_words,
    flat,
    record_picture,
    record_start,
    record_table,
)
from pem_lightning.callbacks.tensorboard import TensorBoard


def test_trackers_are_told_and_others_are_left_alone(tmp_path):
    csv, tracker = CSVLogger(tmp_path), MagicMock(spec=TensorBoard)
    tracker.closing_words.return_value = ("upload", "now")
    start = RunStart({}, [], "val/PQ", 0)
    picture = np.zeros((2, 2, 3), np.uint8)
    loggers = [csv, tracker]
    record_start(loggers, start)
    record_table(loggers, "classes", [{"PQ": 1.0}], 5)
    record_picture(loggers, "picture", picture, 5)
    tracker.record_start.assert_called_once_with(start)
    tracker.record_table.assert_called_once_with("classes", [{"PQ": 1.0}], 5)
    tracker.record_picture.assert_called_once_with("picture", picture, 5)
    assert closing_words(loggers) == [("upload", "now")]
    tracker.closing_words.return_value = None
    assert closing_words(loggers) == []


def test_settings_by_dotted_names():
    config = {"a": {"b": {"c": 1}, "d": [1, 2]}, "e": {}, "f": None}
    assert dict(flat(config)) == {"a.b.c": 1, "a.d": [1, 2], "e": {}, "f": None}
