"""Pictures of a run: prediction panels, the worst images, training curves and the confusion matrix."""

from __future__ import annotations

import csv
import io
import math
from bisect import insort
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Int32, Int64, UInt8
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image
from torch import Tensor

from pem_lightning.callbacks.loggers import log_picture
from pem_lightning.files import write_or_warn
from pem_lightning.inference.fonts import write_names
from pem_lightning.inference.postprocess import Result
from pem_lightning.inference.results import encode_png, stack_instances
from pem_lightning.inference.visualize import class_segments, index_map, overlay_panoptic, side_by_side
from pem_lightning.training.distributed import all_gather
from pem_lightning.training.module import PEMModule
from pem_lightning.types import Batch, DatasetInfo, Sample, Segment

MIN_PANEL_HEIGHT = 256
"""Smaller images are enlarged, so that the class names on them can be read."""

Segmentation = tuple[Int32[np.ndarray, "map_height map_width"], tuple[Segment, ...]]
"""An id map and its segments."""


class Panel(NamedTuple):
    """An image with its annotation and its prediction, on the CPU. Both maps have the annotation's size."""

    image: UInt8[Tensor, "3 height width"]
    truth: Segmentation
    prediction: Segmentation


def make_panel(sample: Sample, result: Result, info: DatasetInfo) -> Panel:
    """Collect what the result's task shows: segments, objects, or one region per class."""
    image, ids, result = sample.image.cpu(), sample.panoptic.cpu(), result.cpu()
    if result.panoptic is not None:
        return Panel(image, (ids.numpy(), sample.segments), (result.panoptic.numpy(), result.segments))
    if result.semantic is not None:
        truth = sample._replace(panoptic=ids).class_map()
        return Panel(image, class_segments(truth, info), class_segments(result.semantic, info))
    things = tuple(segment for segment in sample.segments if segment.is_thing)
    return Panel(image, (ids.numpy(), things), stack_instances(result.instances, tuple(ids.shape)))


def draw_panel(panel: Panel, info: DatasetInfo) -> UInt8[np.ndarray, "height width 3"]:
    """Image, truth and prediction side by side, at the annotation's size or a multiple of it."""
    factor = -(-MIN_PANEL_HEIGHT // panel.truth[0].shape[0])
    photo = _photo(panel, factor)
    overlays = [
        overlay_panoptic(photo, ids.repeat(factor, 0).repeat(factor, 1), segments, info)
        for ids, segments in (panel.truth, panel.prediction)
    ]
    return side_by_side([photo, *overlays], ["image", "truth", "prediction"])


def _photo(panel: Panel, factor: int = 1) -> UInt8[np.ndarray, "height width 3"]:
    """The image at a multiple of the annotation's size; evaluation may have resized the image alone."""
    height, width = panel.truth[0].shape
    image = Image.fromarray(panel.image.permute(1, 2, 0).numpy())
    return np.array(image.resize((factor * width, factor * height), Image.Resampling.BICUBIC))


def panel_masks(panel: Panel, info: DatasetInfo) -> dict[str, dict[str, Any]]:
    """Masks of classes and of single segments in Weights & Biases' format: 8 bits, where 0 is nothing."""
    masks: dict[str, dict[str, Any]] = {}
    for name, (ids, segments) in (("truth", panel.truth), ("prediction", panel.prediction)):
        index = index_map(ids, [segment.id for segment in segments])
        masks[f"{name}_segments"] = {"mask_data": np.where(index < 256, index, 0).astype(np.uint8)}
        if info.num_classes < 256:
            classes = np.array([0, *(segment.class_id + 1 for segment in segments)], np.uint8)
            labels = dict(enumerate(info.class_names, start=1))
            masks[name] = {"mask_data": classes[index], "class_labels": labels}
    return masks


class PredictionPanels(Callback):
    """Draws the first `num_images` of every validation, for loggers and as `directory/step_<step>_<name>.png`."""

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
        """Draw the batch's images as long as there are too few."""
        info = cast(PEMModule, pl_module).info
        first = batch_idx * len(batch.samples)
        for i, (sample, result) in enumerate(zip(batch.samples, outputs["results"], strict=True), first):
            if i >= self.num_images:
                return
            panel = make_panel(sample, result, info)
            picture = draw_panel(panel, info)
            write_or_warn(self.directory / f"step_{trainer.global_step:06d}_{sample.name}.png", encode_png(picture))
            log_picture(trainer, f"panels/{sample.name}", picture, _photo(panel), panel_masks(panel, info))


class WorstImages(Callback):
    """Draws the `num_images` with the lowest scores of all processes (see `Evaluator.update`) after an evaluation.

    Images without a score, where nothing is annotated, are left out. Equal scores are ordered by name. Pictures go to
    `directory/<rank>_<score>_<name>.png`; rank 01 is the worst, the score in percent.
    """

    def __init__(self, directory: str | Path, num_images: int = 10) -> None:
        self.directory = Path(directory)
        self.num_images = num_images
        self._worst: list[tuple[float, str, Panel]] = []  # this process's, by rising score

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the pictures of the last evaluation."""
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
        """Keep `num_images` at most."""
        info = cast(PEMModule, pl_module).info
        for sample, result, score in zip(batch.samples, outputs["results"], outputs["scores"], strict=True):
            full = len(self._worst) >= self.num_images
            if math.isnan(score) or (full and (score, sample.name) > self._worst[-1][:2]):
                continue
            insort(self._worst, (score, sample.name, make_panel(sample, result, info)), key=lambda entry: entry[:2])
            del self._worst[self.num_images :]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rank the images of all processes; each process draws its own."""
        keys = sorted(key for part in all_gather([entry[:2] for entry in self._worst]) for key in part)
        digits = max(2, len(str(self.num_images)))
        for score, name, panel in self._worst:
            rank = keys.index((score, name)) + 1
            if rank <= self.num_images:
                picture = encode_png(draw_panel(panel, cast(PEMModule, pl_module).info))
                write_or_warn(self.directory / f"{rank:0{digits}d}_{100 * score:.1f}_{name}.png", picture)
        self._worst = []


Series = dict[str, list[tuple[int, float]]]
"""Logged name -> (step, value) pairs by rising step."""

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
    """All csv logs of a run in their order; a resumed run has several."""
    return [*sorted(folder.glob("metrics_before_step_*.csv")), folder / "metrics.csv"]


def read_metrics(paths: Iterable[Path]) -> Series:
    """Read Lightning's csv logs. Later files win where steps overlap; missing files are skipped."""
    series: Series = defaultdict(list)
    for path in paths:
        if not path.is_file():
            continue
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]  # a running training may be writing the last line
        for row in csv.DictReader(io.StringIO(complete)):
            if None in row or None in row.values():
                continue  # cut off by a full disk
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    # Lightning counts steps from 0; a curve counts finished steps.
                    series[name].append((int(row["step"]) + 1, float(value)))
    return {name: sorted(dict(points).items()) for name, points in series.items()}


def draw_curves(series: Series, path: Path) -> None:
    """Write a PNG with the losses, raw and smoothed, beside the validation metrics."""
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
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    write_or_warn(path, _as_png(figure))


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average with bias correction."""
    out, average = [], 0.0
    for i, value in enumerate(values, 1):
        average = 0.9 * average + (1 - 0.9) * value
        out.append(average / (1 - 0.9**i))
    return out


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


class Curves(Callback):
    """Redraws `directory/curves.png` from the csv logs after every validation and at the end of training."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        if trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                draw_curves(read_metrics(log_files(Path(logger.log_dir))), self.directory / "curves.png")


MAX_NUMBERED = 40
"""With more classes the cells are too small for numbers."""

MAX_NAME = 24
"""Longer class names are cut; ADE20K's are lists of synonyms."""


def draw_confusion(confusion: Int64[np.ndarray, "K columns"], info: DatasetInfo) -> bytes:
    """Draw pixel counts, true class by predicted class, in percent of each true class's pixels, as a PNG.

    A last column for "no class" is drawn if it is not 0.
    """
    names = [n if len(n) <= MAX_NAME else n[: MAX_NAME - 3].rstrip(" ,") + "..." for n in info.class_names]
    if confusion[:, info.num_classes :].any():
        names.append("none")
    written = write_names(tuple(names))
    counts = confusion[:, : len(names)].astype(np.float64)
    totals = counts.sum(1, keepdims=True)
    percent = np.divide(100 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)

    numbered = info.num_classes <= MAX_NUMBERED
    cell, size = (0.42, 8.0) if numbered else (0.13, 6.0)  # inches, points
    edge = 2.2 + cell * len(names)
    figure = Figure(figsize=(edge + 0.8, edge), dpi=150, layout="constrained")
    axes = figure.subplots()
    # Not linear, because small shares matter.
    image = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto", interpolation="nearest")
    texts = [text for text, _ in written]
    axes.set_yticks(range(info.num_classes), texts[: info.num_classes], fontsize=size)
    axes.set_xticks(range(len(texts)), texts, fontsize=size, rotation=90)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for labels in (axes.get_yticklabels(), axes.get_xticklabels()):
        for label, (_, font) in zip(labels, written, strict=False):  # rows have no "none"
            label.set_parse_math(False)  # a name may have a $
            if font is not None:
                label.set_fontproperties(FontProperties(fname=font, size=size))
    axes.set_ylabel("true class", fontsize=size + 2)
    axes.set_xlabel("predicted class", fontsize=size + 2)
    axes.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(info.num_classes + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#cccccc", linewidth=0.3)
    axes.tick_params(which="minor", length=0, top=False)
    for (row, column), value in np.ndenumerate(percent):
        if numbered and value >= 0.05:  # less would read 0.0
            text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
            color = "white" if value > 40 else "#222222"
            axes.text(column, row, text, ha="center", va="center", fontsize=size - 1.5, color=color)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    bar.set_label("percent of the true class's pixels", fontsize=size + 1)
    bar.ax.tick_params(labelsize=size)
    axes.set_facecolor("#e4e4e4")  # rows of classes that do not occur
    return _as_png(figure)


class ConfusionMatrix(Callback):
    """Draws the confusion matrix of every validation, for `directory/confusion.png` and loggers."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw; the instance task has no matrix."""
        module = cast(PEMModule, pl_module)
        if module.evaluation is not None and module.evaluation.semantic is not None:
            content = draw_confusion(module.evaluation.semantic.confusion, module.info)
            write_or_warn(self.directory / "confusion.png", content)
            with Image.open(io.BytesIO(content)) as image:
                log_picture(trainer, "val/confusion", np.array(image.convert("RGB")))
