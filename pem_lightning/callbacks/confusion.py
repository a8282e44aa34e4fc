"""The confusion matrix as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Float64, Int64
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from PIL import Image

from pem_lightning.callbacks.loggers import record_picture
from pem_lightning.files import write_or_warn
from pem_lightning.module import PEMModule
from pem_lightning.types import DatasetInfo

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
