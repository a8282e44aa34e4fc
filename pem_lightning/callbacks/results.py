"""The end of a run: a table of classes on the console, the same numbers as files, where all is, what to do next."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.table import Table

from pem_lightning.callbacks.closing import course, next_steps, places
from pem_lightning.callbacks.loggers import closing_words, record_table
from pem_lightning.evaluation import Evaluation
from pem_lightning.files import write_file
from pem_lightning.module import PEMModule
from pem_lightning.types import DatasetInfo


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
