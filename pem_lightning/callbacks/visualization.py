"""What a picture of one prediction shows, and the picture: image, truth and prediction."""

from __future__ import annotations

import csv
import io
import math
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
from jaxtyping import Float64, Int64
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

from pem_lightning.callbacks.loggers import Panel, record_panel, record_picture
from pem_lightning.callbacks.shown import Shown, draw_panel, draw_pictures, shown
from pem_lightning.files import write_or_warn
from pem_lightning.inference.results import encode_png
from pem_lightning.training.distributed import all_gather
from pem_lightning.training.module import PEMModule
from pem_lightning.types import Batch, DatasetInfo

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


class PredictionPanels(Callback):
    """Draws the first images of every validation; trackers get them, too.

    Args:
        directory: pictures go to `directory/step_<step>_<name>.png`.
        num_images: how many.
    """

    def __init__(self, directory: str | Path, num_images: int = 4) -> None:
        self.directory = Path(directory)
        self.num_images = num_images

    @rank_zero_only
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw while images are wanted."""
        first = batch_idx * len(batch.samples)
        for i, (sample, result) in enumerate(zip(batch.samples, outputs["results"], strict=True), first):
            if i >= self.num_images:
                return
            info = cast(PEMModule, pl_module).info
            what = shown(sample, result, info)
            panel = Panel(sample.name, what, draw_pictures(what, info))
            path = self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png"
            write_or_warn(path, encode_png(draw_panel(panel.pictures)))
            record_panel(trainer.loggers, panel, info, trainer.global_step)


class WorstImages(Callback):
    """Draws the images of the lowest scores (see `Evaluator.update`) when an evaluation ends.

    Meanwhile every process keeps no more than that many, and of each only what is drawn. Images without a score, where
    nothing is annotated, are left out; among equals the first name comes first.

    Args:
        directory: pictures go to `directory/<rank>_<score>_<name>.png`, the worst being 01, the score in percent.
        num_images: how many, over all processes.
    """

    def __init__(self, directory: str | Path, num_images: int = 10) -> None:
        self.directory = Path(directory)
        self.num_images = num_images
        self._worst: list[tuple[float, str, Shown]] = []  # by rising score

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the last evaluation."""
        self._worst = []
        if trainer.is_global_zero:
            for path in self.directory.glob("[0-9][0-9]*_*.png"):
                path.unlink()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep what is worse than the best kept."""
        info = cast(PEMModule, pl_module).info
        for sample, result, score in zip(batch.samples, outputs["results"], outputs["scores"], strict=True):
            full = len(self._worst) >= self.num_images
            if math.isnan(score) or (full and (score, sample.name) > self._worst[-1][:2]):
                continue
            insort(self._worst, (score, sample.name, shown(sample, result, info)), key=lambda entry: entry[:2])
            del self._worst[self.num_images :]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the worst of all processes; each draws its own of them."""
        keys = sorted(key for part in all_gather([entry[:2] for entry in self._worst]) for key in part)
        digits = max(2, len(str(self.num_images)))
        for score, name, what in self._worst:
            rank = keys.index((score, name)) + 1
            if rank <= self.num_images:
                panel = encode_png(draw_panel(draw_pictures(what, cast(PEMModule, pl_module).info)))
                write_or_warn(self.directory / f"{rank:0{digits}d}_{100 * score:.1f}_{name}.png", panel)
        self._worst = []


MAX_NUMBERED = 40
"""With more classes the cells are too small for numbers."""

MAX_NAME = 24
"""Characters of a class name that are written."""


def draw_confusion(confusion: Int64[np.ndarray, "K columns"], info: DatasetInfo) -> bytes:
    """Draw what became of every class's pixels, in percent of them, as a PNG.

    Args:
        confusion: pixel counts, true class by predicted class; a last column of none of the classes is drawn if it
            has any.
        info: the classes.
    """
    names = [_shortened(name) for name in info.class_names]
    if confusion[:, info.num_classes :].any():
        names.append("none")
    counts = confusion[:, : len(names)].astype(np.float64)
    totals = counts.sum(1, keepdims=True)
    percent = np.divide(100 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

    numbered = info.num_classes <= MAX_NUMBERED
    cell, size = (0.42, 8.0) if numbered else (0.13, 6.0)  # inches, points
    edge = 2.2 + cell * len(names)
    figure = Figure(figsize=(edge + 0.8, edge), dpi=150, layout="constrained")
    axes = figure.subplots()
    # Small shares matter: a linear scale would show the diagonal only.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto", interpolation="nearest")
    _label(axes, names[: info.num_classes], names, size)
    if numbered:
        _write_numbers(axes, percent, size - 1.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("percent of the true class's pixels", fontsize=size + 1)
    bar.ax.tick_params(labelsize=size)
    axes.set_facecolor("#e4e4e4")  # rows of classes that do not occur
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _shortened(name: str) -> str:
    """ADE20K's names are lists of synonyms."""
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 3].rstrip(" ,") + "..."


def _label(axes: Axes, rows: list[str], columns: list[str], size: float) -> None:
    axes.set_yticks(range(len(rows)), rows, fontsize=size)
    axes.set_xticks(range(len(columns)), columns, fontsize=size, rotation=90)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.set_ylabel("true class", fontsize=size + 2)
    axes.set_xlabel("predicted class", fontsize=size + 2)
    axes.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#cccccc", linewidth=0.3)
    axes.tick_params(which="minor", length=0, top=False)


def _write_numbers(axes: Axes, percent: Float64[np.ndarray, "K columns"], size: float) -> None:
    for (row, column), value in np.ndenumerate(percent):
        if value >= 0.05:  # less is shown as nothing
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            color = "white" if value > 40 else "#222222"
            axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color)


class ConfusionMatrix(Callback):
    """Writes the confusion matrix of every validation, and tells it the trackers; the instance task has none.

    Args:
        directory: gets `confusion.png`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        module = cast(PEMModule, pl_module)
        if module.evaluation is not None and module.evaluation.semantic is not None:
            picture = draw_confusion(module.evaluation.semantic.confusion, module.info)
            write_or_warn(self.directory / "confusion.png", picture)
            with Image.open(io.BytesIO(picture)) as image:
                record_picture(trainer.loggers, "val/confusion", np.array(image.convert("RGB")), trainer.global_step)
