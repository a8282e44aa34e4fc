"""TensorBoard: what `make dashboard` shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml
from jaxtyping import UInt8
from lightning.pytorch.loggers import TensorBoardLogger

from pem_lightning.callbacks.loggers import Guarded, Panel, RunStart, Tracker, session, settings_of, title_of
from pem_lightning.inference.visualize import draw_caption
from pem_lightning.types import DatasetInfo

MAX_WIDTH = 2048
"""Wider pictures are reduced to that many pixels."""

PANEL_WIDTH = 1024
"""Likewise, of panels: a page shows several."""

LAYOUT = {
    "Losses and quality": {
        "Quality": ["Multiline", ["val/PQ$", "val/mIoU$", "val/AP$"]],
        "PQ of things and stuff": ["Multiline", ["val/PQ_things", "val/PQ_stuff"]],
        "Loss, all layers": ["Multiline", ["train/loss$"]],
        "Losses of the last layer": ["Multiline", ["train/loss_(ce|mask|dice)$"]],
        "Learning rate": ["Multiline", ["lr/.*"]],
        "Images per second": ["Multiline", ["train/images_per_second"]],
    },
    "Losses by layer": {
        name: ["Multiline", [rf"train/loss_{part}(_\d+)?$"]]
        for name, part in (("Class", "ce"), ("Mask", "mask"), ("Dice", "dice"))
    },
}
"""Charts of the tab "Custom scalars"; tags are regular expressions."""


class TensorBoard(Guarded, Tracker, TensorBoardLogger):
    """Writes a run's event files into the run's folder itself, whose name is the run's in TensorBoard, then.

    Args:
        save_dir: the run's folder.
        flush_secs: how old what is on disk may be.
        kwargs: of TensorBoard's `SummaryWriter`.
    """

    def __init__(self, save_dir: str | Path, flush_secs: int = 5, **kwargs: Any) -> None:
        super().__init__(save_dir, name="", version="", default_hp_metric=False, flush_secs=flush_secs, **kwargs)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; Lightning counts steps from 0, the reader of a curve counts those that are done."""
        own = {name: value for name, value in metrics.items() if name != "epoch"}
        super().log_metrics(own, step if step is None else step + 1)

    def save(self) -> None:
        """Nothing: the writer saves by itself. Lightning's would wait for the disk at every call."""

    def record_start(self, start: RunStart) -> None:
        """Hyperparameters, the whole experiment as a text, the charts of "Custom scalars"."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment
        # What the folder has beyond that step is of a run that broke off, or was overwritten: it disappears.
        restart = SessionLog(status=SessionLog.START)
        writer.file_writer.add_event(Event(session_log=restart), start.step + 1)
        for summary in session(title_of(Path(self.log_dir)), settings_of(start.config)):
            writer.file_writer.add_summary(summary)
        writer.add_text("overrides", _code("\n".join(start.overrides) or "(none)"), start.step)
        whole = yaml.safe_dump(_containers(start.config), sort_keys=False, allow_unicode=True, width=120)
        writer.add_text("config", _code(whole), start.step)
        writer.add_custom_scalars(LAYOUT)
        writer.flush()  # the dashboard shows the run from here on

    def record_panel(self, panel: Panel, info: DatasetInfo, step: int) -> None:
        """Image, truth and prediction one below the other: a page has narrow columns."""
        rows = []
        for title, picture in panel.pictures.items():
            row = _reduced(picture, PANEL_WIDTH).copy()
            draw_caption(row, title)
            rows += [row, np.full((4, row.shape[1], 3), 255, np.uint8)]
        self.record_picture(f"panels/{panel.name}", np.concatenate(rows[:-1]), step)

    def record_table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """As Markdown in the tab "Text"."""
        numeric = [isinstance(value, int | float) for value in rows[0].values()]
        lines = [list(rows[0]), ["--:" if right else "---" for right in numeric]]
        lines += [[_cell(value) for value in row.values()] for row in rows]
        self.experiment.add_text(name, "\n".join("| " + " | ".join(line) + " |" for line in lines), step)

    def record_picture(self, name: str, picture: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """In the tab "Images"."""
        self.experiment.add_image(name, _reduced(picture, MAX_WIDTH), step, dataformats="HWC")


def _reduced(picture: UInt8[np.ndarray, "height width 3"], max_width: int) -> UInt8[np.ndarray, "_ _ 3"]:
    height, width = picture.shape[:2]
    if width <= max_width:
        return picture
    size = (max_width, round(height * max_width / width))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _containers(value: Any) -> Any:
    """Lists and dictionaries, which YAML writes without tags."""
    if isinstance(value, Mapping):
        return {key: _containers(item) for key, item in value.items()}
    return [_containers(item) for item in value] if isinstance(value, list | tuple) else value


def _code(text: str) -> str:
    """A block of code in Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1f}"
    return str(value).replace("|", "/")
