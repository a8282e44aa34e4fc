"""The end of a run: a table of classes on the console, the same numbers as files, where all is, what to do next."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from pem_lightning.callbacks.loggers import closing_words, readable, record_table
from pem_lightning.callbacks.progress import Throughput
from pem_lightning.cli.errors import key_of
from pem_lightning.data import SegmentationDataModule
from pem_lightning.files import id_to_rgb, write_file
from pem_lightning.inference.results import coco_instance, encode_png, official_class_map, segments_info
from pem_lightning.metrics.evaluator import Evaluation
from pem_lightning.training.module import PEMModule
from pem_lightning.types import Batch, DatasetInfo, UserError


def class_table(evaluation: Evaluation, info: DatasetInfo) -> Table:
    """All classes that the task has, with their metrics in percent; a dash where a class does not occur."""
    rows = evaluation.per_class(info)
    table = Table(title=f"{info.name}, by class (percent)", header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name in ("class", "kind") else "right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def summary(evaluation: Evaluation) -> str:
    """The headline numbers in percent, a line each."""
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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1f}"
    return str(value)


class Results(Callback):
    """Tells trackers every validation's classes, and prints and writes the last one's numbers when a run ends.

    Args:
        directory: gets `metrics.json` and `per_class.csv`.
        monitor: the task's metric, by its logged name; the more the better.
    """

    def __init__(self, directory: str | Path, monitor: str) -> None:
        self.directory = Path(directory)
        self.monitor = monitor
        self._best: tuple[float, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best validation, which a resumed run goes on from."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._best = state_dict["best"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report training's last validation."""
        self._report(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report an evaluation by itself; in training remember the best, and let trackers have the classes."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module)
            return
        value = float(trainer.callback_metrics.get(self.monitor, math.nan))
        if not math.isnan(value) and (self._best is None or value > self._best[0]):
            self._best = (value, trainer.global_step)
        module = cast(PEMModule, pl_module)
        if module.evaluation is not None:
            rows = module.evaluation.per_class(module.info)
            record_table(trainer.loggers, "val/per_class", rows, trainer.global_step)

    @rank_zero_only
    def _report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(PEMModule, pl_module)
        evaluation, info = module.evaluation, module.info
        console = Console()
        if evaluation is not None:  # None if training stopped before the first validation
            rows = evaluation.per_class(info)
            metrics = {"step": trainer.global_step, **evaluation.scalars(), "per_class": rows}
            write_file(self.directory / "metrics.json", json.dumps(_without_nan(metrics), indent=2) + "\n")
            table = io.StringIO()
            writer = csv.DictWriter(table, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
            write_file(self.directory / "per_class.csv", table.getvalue())
            console.print(class_table(evaluation, info))
            console.print(summary(evaluation), highlight=False)
        lines = places(self.directory)
        if trainer.state.fn == "fit":
            overrides = module.record.get("overrides", [])
            lines = [
                *course(trainer, self.monitor, self._best),
                *lines,
                *next_steps(trainer, self.directory, overrides),
            ]
        for what, text in [*lines, *closing_words(trainer.loggers)]:
            console.print(f"{what:12} {text}", highlight=False, markup=False, soft_wrap=True)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN; null says the same."""
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


Line = tuple[str, str]

PLACES = {
    "checkpoints": "checkpoints",
    "curves": "curves.png",
    "overlays": "panels",
    "worst images": "worst",
    "confusion": "confusion.png",
    "numbers": "metrics.json",
}
"""What is in a run's folder."""


def course(trainer: Trainer, monitor: str, best: tuple[float, int] | None) -> list[Line]:
    """How long, how fast, how well.

    Args:
        trainer: after training; without a `Throughput` among its callbacks nobody knows how long and how fast.
        monitor: the task's metric.
        best: its best value in percent, and the step.
    """
    lines = []
    for measured in (c for c in cast(Any, trainer).callbacks if isinstance(c, Throughput)):
        watch, wait = measured.watch, measured.data_wait_percent
        took = f"{_clock(watch.training + watch.validating)} for {watch.steps} steps"
        lines.append(("time", f"{took}, of which validation {_clock(watch.validating)}"))
        waiting = "" if wait is None else f", {wait:.1f} % of the time waiting for data"
        lines.append(("speed", f"{watch.images / max(watch.training, 1e-9):.1f} images/s{waiting}"))
    if best is not None:
        lines.append(("best", f"{monitor.removeprefix('val/')} {best[0]:.1f} at step {best[1]}"))
    return lines


def places(directory: Path) -> list[Line]:
    """Where everything is, of what there is."""
    paths = {what: directory / name for what, name in PLACES.items()}
    return [(what, readable(path)) for what, path in paths.items() if path.exists()]


def next_steps(trainer: Trainer, directory: Path, overrides: Sequence[str]) -> list[Line]:
    """The commands to go on with.

    Args:
        trainer: after training.
        directory: the run's.
        overrides: the command line's part of the experiment.
    """
    lines = []
    best, last = (directory / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    if last.exists():
        own = [o for o in overrides if key_of(o) not in ("resume", "weights", "recipe.max_steps")]
        done = trainer.global_step >= trainer.max_steps > 0
        longer = [o for o in overrides if key_of(o) == "recipe.max_steps"]
        steps = [f"recipe.max_steps={2 * trainer.max_steps}"] if done else longer
        command = shlex.join(["python", "train.py", *own, *steps, f"resume={readable(last)}"])
        lines.append(("train longer" if done else "go on", command))
    for path in [path for path in (best, last) if path.exists()][:1]:
        checkpoint = shlex.quote(f"checkpoint={readable(path)}")
        lines.append(("evaluate", f"python evaluate.py {checkpoint}"))
        lines.append(("predict", f"python predict.py {checkpoint} input=IMAGE"))
    return lines


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


_JSON = {"panoptic": ("panoptic.json", '{"annotations": [', "]}"), "instance": ("instances.json", "[", "]")}
"""By task: name, beginning and end of the file with all entries; the semantic task has none."""


class SavePredictions(Callback):
    """Writes every image's prediction as soon as there is one, and what describes all of them last.

    | task | files |
    |---|---|
    | semantic | `semantic/<name>.png`: official class ids; named as the data set's server wants it |
    | panoptic | `panoptic/<name>.png` with ids as colours, `panoptic.json`: COCO's panoptic results |
    | instance | `instances.json`: COCO's instance results, a list with run-length masks |

    Images and classes have the ids of the data set's own files. Entries of a JSON are lines of
    `<task>.part<process>.jsonl` until all are there; a run that breaks leaves these behind. All processes write into
    the same folder, and the JSON has the order of the data set.

    Args:
        directory: is made if need be; files of an earlier run are overwritten. None writes nothing.
    """

    def __init__(self, directory: str | Path | None) -> None:
        self.directory = None if directory is None else Path(directory)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start this process's part.

        Raises:
            UserError: the folder cannot be written.
        """
        task = cast(PEMModule, pl_module).inference.task
        if self.directory is not None and task in _JSON:
            write_file(self._part(task, trainer.global_rank), "")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the images of one batch.

        Raises:
            UserError: a file cannot be written.
        """
        if self.directory is None:
            return
        module, datamodule = cast(PEMModule, pl_module), cast(SegmentationDataModule, cast(Any, trainer).datamodule)
        task, info, dataset = module.inference.task, module.info, datamodule.val_dataset
        for sample, result in zip(batch.samples, outputs["results"], strict=True):
            found, name = result.cpu(), sample.name
            image_id = dataset.image_ids.get(name, name)
            if task == "semantic":
                picture = encode_png(official_class_map(found.semantic, info))
                write_file(self.directory / "semantic" / f"{name}{dataset.prediction_suffix}.png", picture)
            elif task == "panoptic":
                write_file(self.directory / "panoptic" / f"{name}.png", encode_png(id_to_rgb(found.panoptic.numpy())))
                described = segments_info(found.panoptic, found.segments, info)
                entry = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": described}
                self._append(task, trainer.global_rank, [entry])
            else:
                self._append(task, trainer.global_rank, [coco_instance(i, image_id, info) for i in found.instances])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring the parts of all processes together.

        Raises:
            UserError: the JSON cannot be written.
        """
        if self.directory is None:
            return
        trainer.strategy.barrier()  # the others' parts are complete
        if not trainer.is_global_zero:
            return
        task = cast(PEMModule, pl_module).inference.task
        if task in _JSON:
            name, begin, end = _JSON[task]
            parts = [self._part(task, rank) for rank in range(trainer.world_size)]
            write_file(self.directory / name, begin + "\n" + ",\n".join(_in_order(parts)) + "\n" + end + "\n")
            for part in parts:
                part.unlink()
        print(f"{'predictions':12} {self.directory}")

    def _part(self, task: str, rank: int) -> Path:
        assert self.directory is not None
        return self.directory / f"{task}.part{rank}.jsonl"

    def _append(self, task: str, rank: int, entries: Sequence[dict[str, Any]]) -> None:
        """Add one image's entries as one line, which may be empty."""
        path = self._part(task, rank)
        try:
            with path.open("a") as file:
                file.write(", ".join(map(json.dumps, entries)) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path} ({error.strerror}): choose another folder or make room") from error


def _in_order(parts: Sequence[Path]) -> Iterator[str]:
    """The lines that are not empty, in the order of the data set: its images are dealt out to the processes in turn."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open()) for part in parts]
        for turn in zip_longest(*files, fillvalue=""):
            yield from filter(None, (line.strip() for line in turn))
