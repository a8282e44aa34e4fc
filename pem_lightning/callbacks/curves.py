"""Learning curves as a picture, drawn from the csv log."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pem_lightning.files import write_or_warn

Series = dict[str, list[tuple[int, float]]]
"""Metric name -> (step, value) pairs by rising step."""

# Logged name -> (label, colour).
LOSSES = {
    "train/loss": ("all layers", "#444444"),
    "train/loss_ce": ("class", "#1b7f79"),
    "train/loss_mask": ("mask", "#d1495b"),
    "train/loss_dice": ("dice", "#edae49"),
}
METRICS = {
    "val/PQ": ("PQ", "#1f3a5f"),
    "val/PQ_things": ("PQ things", "#d1495b"),
    "val/PQ_stuff": ("PQ stuff", "#1b7f79"),
    "val/mIoU": ("mIoU", "#edae49"),
    "val/AP": ("AP", "#1f3a5f"),
    "val/AP50": ("AP50", "#d1495b"),
}


def log_files(folder: Path) -> list[Path]:
    """All csv logs of a run, in their order: a run that was resumed has several, `metrics*.csv`."""
    return [*sorted(folder.glob("metrics_before_step_*.csv")), folder / "metrics.csv"]


def read_metrics(paths: Iterable[Path]) -> Series:
    """Read Lightning's csv logs; later files win where steps meet, and missing files are passed over."""
    series: Series = defaultdict(list)
    for path in paths:
        if not path.is_file():
            continue
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]  # a run that goes on may be writing the last line
        for row in csv.DictReader(io.StringIO(complete)):
            if None in row or None in row.values():
                continue  # a full disk cut it off
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    # Lightning counts steps from 0; the reader of a curve counts those that are done.
                    series[name].append((int(row["step"]) + 1, float(value)))
    return {name: sorted(dict(points).items()) for name, points in series.items()}


def draw_curves(series: Series, path: Path) -> None:
    """Write losses (smoothed over the raw ones) and validation metrics, side by side, as a PNG."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="constrained")
    losses, metrics = figure.subplots(1, 2)
    for name, (label, color) in LOSSES.items():
        if points := series.get(name):
            steps, values = zip(*points, strict=True)
            losses.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
            losses.plot(steps, _smooth(values), color=color, label=label, linewidth=1.8)
    losses.set_yscale("log")
    losses.set_title("Training losses: sum of all layers, and those of the last", fontsize=10)
    for name, (label, color) in METRICS.items():
        if points := series.get(name):
            metrics.plot(*zip(*points, strict=True), color=color, marker="o", markersize=3.5, label=label)
    metrics.set_ylim(0, 100)
    metrics.set_title("Validation, percent", fontsize=10)
    for axes in (losses, metrics):
        _style(axes)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_or_warn(path, picture.getvalue())


def _style(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def _smooth(values: tuple[float, ...], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start."""
    out, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        out.append(average / (1 - weight**i))
    return out


class Curves(Callback):
    """Redraws `curves.png` after every validation and at the end, from all logs of the run.

    Args:
        directory: where the picture goes.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @rank_zero_only
    def _draw(self, trainer: Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                draw_curves(read_metrics(log_files(Path(logger.log_dir))), self.directory / "curves.png")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Redraw; not in the run's own evaluation, which has no curve."""
        if trainer.state.fn == "fit":
            self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Redraw with the last losses."""
        self._draw(trainer)
