"""The results of a run: metrics.json, per_class.csv, saved predictions, and the run summary on the console."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import time
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from pem_lightning.data import SegmentationDataModule
from pem_lightning.files import check_writable, id_to_rgb, write_file
from pem_lightning.inference.results import coco_instance, encode_png, official_class_map, segments_info
from pem_lightning.installation import job_command
from pem_lightning.metrics.evaluator import Evaluation, without_nan
from pem_lightning.training.distributed import all_gather
from pem_lightning.training.module import PEMModule
from pem_lightning.types import Batch, DatasetInfo

FILES = {
    "checkpoints": "checkpoints",
    "curves": "curves.png",
    "overlays": "panels",
    "worst images": "worst",
    "confusion": "confusion.png",
    "numbers": "metrics.json",
}
"""What the run summary lists of a run's folder."""


class Results(Callback):
    """Gives loggers the configuration and every validation's classes; writes and prints the results at the end."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._start = (0.0, 0)  # time and step

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the configuration; TensorBoard forgets the steps of an interrupted run that are repeated now."""
        self._start = (time.monotonic(), trainer.global_step)
        for logger in trainer.loggers:
            logger.log_hyperparams(cast(PEMModule, pl_module).record.get("config", {}))
            if isinstance(logger, TensorBoardLogger) and trainer.global_step:
                from tensorboard.compat.proto.event_pb2 import Event, SessionLog

                restart = Event(session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(restart, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report an evaluation; in training log the classes, which TensorBoard has no table for."""
        module = cast(PEMModule, pl_module)
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module)
        elif module.evaluation is not None:
            rows = without_nan(module.evaluation.per_class(module.info))
            data = [list(row.values()) for row in rows]
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.log_table("val/per_class", list(rows[0]), data, step=trainer.global_step - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last validation; TensorBoard's table of runs needs the configuration and a metric together."""
        self._report(trainer, pl_module)
        best = _best(trainer)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and best is not None:
                config = cast(PEMModule, pl_module).record.get("config", {})
                logger.log_hyperparams(config, {f"best/{best[0]}": best[1]}, trainer.global_step - 1)

    @rank_zero_only
    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PEMModule, pl_module)
        evaluation, info = module.evaluation, module.info
        console = Console()
        if evaluation is not None:  # None if training stopped before the first validation
            rows = evaluation.per_class(info)
            metrics = evaluation.report(info, module.evaluated_step)
            write_file(self.directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            table = io.StringIO()
            writer = csv.DictWriter(table, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
            write_file(self.directory / "per_class.csv", table.getvalue())
            console.print(class_table(evaluation, info))
            console.print(summary(evaluation), highlight=False)
        lines = [(name, readable(self.directory / file)) for name, file in FILES.items()]
        lines = [(name, path) for name, path in lines if Path(path).exists()]
        if trainer.state.fn == "fit":
            start, first_step = self._start
            took = timedelta(seconds=round(time.monotonic() - start))
            course = [("time", f"{took} for {trainer.global_step - first_step} steps")]
            if (speed := trainer.callback_metrics.get("train/images_per_second")) is not None:
                course.append(("throughput", f"{float(speed):.1f} images/s at the end"))
            if (best := _best(trainer)) is not None:
                course.append(("best", f"{best[0].removeprefix('val/')} {best[1]:.1f}"))
            lines = [*course, *lines, *next_steps(trainer, self.directory, module.record)]
        for name, text in lines:
            console.print(f"{name:12} {text}", highlight=False, markup=False, soft_wrap=True)


def _best(trainer: Trainer) -> tuple[str, float] | None:
    """The task's metric and its best value, from the callback that keeps the best checkpoint."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_score is not None:
            return callback.monitor, float(callback.best_model_score)
    return None


def class_table(evaluation: Evaluation, info: DatasetInfo) -> Table:
    """The metrics of all classes in percent; a dash where a class does not occur."""
    rows = evaluation.per_class(info)
    table = Table(title=f"{info.name}, by class (percent)", header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("class", "kind") else "right")
    for row in rows:
        table.add_row(*(_cell(value) if isinstance(value, float) else str(value) for value in row.values()))
    return table


def summary(evaluation: Evaluation) -> str:
    """The main numbers in percent."""
    lines = []
    if (panoptic := evaluation.panoptic) is not None:
        for name, group in (("all", panoptic.all), ("things", panoptic.things), ("stuff", panoptic.stuff)):
            lines.append(f"{name:12} PQ {100 * group.pq:.1f}   SQ {100 * group.sq:.1f}   RQ {100 * group.rq:.1f}")
    if (semantic := evaluation.semantic) is not None:
        lines.append(f"{'pixels':12} mIoU {100 * semantic.miou:.1f}   accuracy {100 * semantic.pixel_accuracy:.1f}")
    if (instance := evaluation.instance) is not None:
        ap, ap50, ap75, *by_size = (_cell(100 * value) for value in instance.all)
        lines.append(f"{'objects':12} AP {ap}   AP50 {ap50}   AP75 {ap75}")
        lines += [f"{name:12} AP {value}" for name, value in zip(("small", "medium", "large"), by_size, strict=True)]
    return "\n".join(lines)


def _cell(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def readable(path: Path) -> str:
    """A path as it is typed: relative to the current folder if it is inside."""
    absolute = path.resolve()
    return str(absolute.relative_to(Path.cwd()) if absolute.is_relative_to(Path.cwd()) else path)


def next_steps(trainer: Trainer, directory: Path, record: Any) -> list[tuple[str, str]]:
    """Commands to train on, with the overrides in the `PEMModule`'s record, to evaluate and to predict."""
    lines = []
    best, last = (directory / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    saved = any(last.parent.glob("last*.ckpt"))  # the end becomes `last.ckpt` once the results are written
    if saved:
        keys = {override: override.split("=")[0].lstrip("+~") for override in record.get("overrides", [])}
        own = [o for o, key in keys.items() if key not in ("resume", "weights", "recipe.max_steps")]
        done = trainer.global_step >= trainer.max_steps > 0
        longer = [o for o, key in keys.items() if key == "recipe.max_steps"]
        steps = [f"recipe.max_steps={2 * trainer.max_steps}"] if done else longer
        command = shlex.join([*job_command("train").split(), *own, *steps, f"resume={readable(last)}"])
        lines.append(("train longer" if done else "go on", command))
    for path in [path for path, exists in ((best, best.exists()), (last, saved)) if exists][:1]:
        checkpoint = shlex.quote(f"checkpoint={readable(path)}")
        lines.append(("evaluate", f"{job_command('evaluate')} {checkpoint}"))
        lines.append(("predict", f"{job_command('predict')} {checkpoint} input=IMAGE"))
    return lines


_JSON = {"panoptic": ("panoptic.json", '{"annotations": [', "]}"), "instance": ("instances.json", "[", "]")}
"""Task -> name, beginning and end of its JSON; the semantic task has none."""


class SavePredictions(Callback):
    """Writes the prediction of every image, in the ids of the data set's own files.

    | task | files |
    |---|---|
    | semantic | `semantic/<name>.png` with official class ids; named as the data set's server wants it |
    | panoptic | `panoptic/<name>.png` with ids as colours, `panoptic.json`: COCO's panoptic results |
    | instance | `instances.json`: COCO's instance results, a list with run-length masks |

    All processes write into the same folder, files of an earlier run are overwritten; None writes nothing. The JSON is
    written at the end, in the data set's order.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)
        self._entries: list[str] = []  # this process's, one per image

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder that cannot be written before the work."""
        self._entries = []
        if self.directory is not None:
            check_writable(self.directory)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the images of one batch."""
        if self.directory is None:
            return
        module, datamodule = cast(PEMModule, pl_module), cast(SegmentationDataModule, cast(Any, trainer).datamodule)
        task, info, dataset = module.inference.task, module.info, datamodule.val_dataset
        for sample, result in zip(batch.samples, outputs["results"], strict=True):
            result, name, entries = result.cpu(), sample.name, []
            image_id = dataset.image_ids.get(name, name)
            if task == "semantic":
                picture = encode_png(official_class_map(result.semantic, info))
                write_file(self.directory / "semantic" / f"{name}{dataset.prediction_suffix}.png", picture)
            elif task == "panoptic":
                write_file(self.directory / "panoptic" / f"{name}.png", encode_png(id_to_rgb(result.panoptic.numpy())))
                segments = segments_info(result.panoptic, result.segments, info)
                entries = [{"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}]
            else:
                entries = [coco_instance(instance, image_id, info) for instance in result.instances]
            self._entries.append(", ".join(map(json.dumps, entries)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the entries of all processes."""
        if self.directory is None:
            return
        parts, self._entries = all_gather(self._entries), []
        if not trainer.is_global_zero:
            return
        task = cast(PEMModule, pl_module).inference.task
        if task in _JSON:
            name, begin, end = _JSON[task]
            # The processes take the images in turn.
            entries = [entry for turn in zip_longest(*parts) for entry in turn if entry]
            write_file(self.directory / name, begin + "\n" + ",\n".join(entries) + "\n" + end + "\n")
        print(f"{'predictions':12} {self.directory}")
