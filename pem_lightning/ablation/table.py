"""Runs as tables: a row per variant, and which runs may stand in one table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from pem_lightning.ablation.runs import Run
from pem_lightning.ablation.variants import ABLATIONS, FAMILIES, Term, setting_of, special_of, terms_of

DEFAULT = "PEM"
"""Name of the variant that changes nothing."""

METRICS = {
    "panoptic": {"PQ": "PQ", "things": "PQ_things", "stuff": "PQ_stuff", "mIoU": "mIoU"},
    "semantic": {"mIoU": "mIoU"},
    "instance": {"AP": "AP", "AP50": "AP50"},
}
"""Task -> column -> the log's name; the first is the main metric."""


class Statistic(NamedTuple):
    """Of one metric over the seeds, in percent.

    Attributes:
        mean: over `values`.
        std: sample standard deviation (n - 1); None for a single value.
        values: one per run.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistic:
        """Summarise at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


@dataclass(frozen=True)
class Variant:
    """Runs that differ in nothing but the seed.

    Attributes:
        terms: what they change against the default.
        runs: one per seed, by rising seed: the one that came farthest, and of those the newest.
    """

    terms: tuple[Term, ...]
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """Such as "PEM", "no masking" or "no CSM, 3 layers"."""
        return ", ".join(term.words for term in self.terms) or DEFAULT

    @property
    def is_default(self) -> bool:
        """Whether it changes nothing."""
        return not self.terms

    @property
    def num_layers(self) -> int:
        """Of the transformer decoder."""
        return int(self.runs[0].config["network"].get("num_layers", 6))

    @cached_property
    def counted(self) -> tuple[Run, ...]:
        """The runs that numbers are of: the finished ones; only if there are none, those that were validated."""
        validated = [run for run in self.runs if run.validations(run.metric)]
        return tuple([run for run in validated if run.finished] or validated)

    @cached_property
    def step(self) -> int | None:
        """Of the last validation that all counted runs share: numbers are of that one. None without any."""
        shared = [set(run.validations(run.metric)) for run in self.counted]
        return max(set.intersection(*shared), default=None) if shared else None

    @property
    def finished(self) -> bool:
        """Whether numbers are those of finished runs."""
        return bool(self.counted) and self.counted[0].finished and self.step is not None

    def statistic(self, metric: str) -> Statistic | None:
        """A metric over the counted runs at `step`; None where it was not measured.

        Args:
            metric: as the log calls it, but for its `val/`.
        """
        values = [run.validations(metric).get(self.step or 0) for run in self.counted]
        known = [value for value in values if value is not None]
        return Statistic.of(known) if known else None

    @property
    def progress(self) -> str:
        """How far its runs are, such as "600", or "180 of 600" for the shortest."""
        shortest = min(self.counted or self.runs, key=lambda run: run.step)
        return shortest.progress.removesuffix(" steps")


@dataclass(frozen=True)
class Table:
    """Runs whose numbers may be compared: same data, task, crops, batch, steps and evaluation.

    Attributes:
        variants: the default first, then by family.
        common: changes against the default experiment that all its runs share, in words; no ablations.
    """

    variants: tuple[Variant, ...]
    common: tuple[str, ...]

    @property
    def example(self) -> Run:
        """Any of its runs, for what they share."""
        return self.variants[0].runs[0]

    @property
    def runs(self) -> list[Run]:
        """Those of all variants."""
        return [run for variant in self.variants for run in variant.runs]

    @property
    def title(self) -> str:
        """Such as "synthetic, panoptic, 600 steps"."""
        return f"{self.example.dataset}, {self.example.task}, {self.example.max_steps} steps"

    @property
    def scale(self) -> str:
        """Batch and crop, and what all runs share beyond the default, in words."""
        recipe = self.example.config["recipe"]
        height, width = recipe["train_transform"]["crop_size"]
        text = f"{recipe['global_batch_size']} crops of {height} x {width} per step"
        return text + (f"; in all runs: {', '.join(self.common)}" if self.common else "")

    @cached_property
    def columns(self) -> dict[str, str]:
        """The metrics that were measured: column -> the log's name; the first is the main one."""
        known = METRICS.get(self.example.task, {})
        measured = {c: m for c, m in known.items() if any(v.statistic(m) for v in self.variants)}
        return measured or {self.example.metric: self.example.metric}

    @property
    def default(self) -> Variant | None:
        """The variant that changes nothing, if it was trained."""
        return next((variant for variant in self.variants if variant.is_default), None)

    def difference(self, variant: Variant) -> float | None:
        """Mean of the main metric minus the default's; None unless both are known after the same number of steps."""
        default, metric = self.default, self.example.metric
        if default is None or variant is default or default.step != variant.step:
            return None
        ours, theirs = variant.statistic(metric), default.statistic(metric)
        return ours.mean - theirs.mean if ours and theirs else None


def tabulate(runs: Iterable[Run], say: Callable[[str], None] = lambda line: None) -> list[Table]:
    """Group runs into tables and variants.

    A table's runs agree in data set, task, evaluation, number of steps, batch and crops. Its rows differ in what is
    left: network, losses, optimiser. Seed, loggers, devices and folders make no row. What all runs of a table change
    alike is said once, above it, unless it is an ablation of the paper.

    Args:
        runs: of `read_runs`.
        say: is told of runs that do not count, because another one has the same variant and seed.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[setting_of(run)].append(run)
    return [_table(group, say) for group in groups.values()]


def _table(runs: list[Run], say: Callable[[str], None]) -> Table:
    terms = {run.path: terms_of(run) for run in runs}
    shared = set.intersection(*map(set, terms.values()))
    shared = {term for term in shared if term.family not in ABLATIONS}
    variants: dict[tuple[Term, ...], list[Run]] = defaultdict(list)
    for run in runs:
        variants[tuple(term for term in terms[run.path] if term not in shared)].append(run)
    common = [term.words for term in terms[runs[0].path] if term in shared]
    return Table(
        variants=tuple(Variant(key, _one_per_seed(variants[key], say)) for key in sorted(variants, key=_order)),
        common=(*special_of(runs[0]), *common),
    )


def _order(terms: tuple[Term, ...]) -> tuple[Any, ...]:
    """The default, then single changes by family, then combinations."""
    return len(terms), [(FAMILIES.index(term.family), term.rank, term.words) for term in terms]


def _one_per_seed(runs: list[Run], say: Callable[[str], None]) -> tuple[Run, ...]:
    best: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.step, _age(run))):
        if run.seed in best:
            say(f"left out {best[run.seed].path}: {run.path} is the same experiment, as far or farther, and newer")
        best[run.seed] = run
    return tuple(best[seed] for seed in sorted(best))


def _age(run: Run) -> float:
    """When it was written last; later is greater."""
    return max((path.stat().st_mtime for path in (run.path / "csv").glob("*.csv")), default=0.0)
