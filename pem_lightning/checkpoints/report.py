"""What became of every weight of a file and of every weight of the network."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from pem_lightning.checkpoints.foreign import Weights
from pem_lightning.checkpoints.official import guess_backbone
from pem_lightning.errors import UserError

log = logging.getLogger(__name__)

CLASS_HEAD = "transformer_decoder.class_head."
_COUNTER = "num_batches_tracked"
"""Batch normalisation's counter: frozen ones and old files have none, and nothing depends on it."""

_SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """A comparison of weights with a network.

    Attributes:
        source: path or name of the weights.
        kind: whose format they have.
        loaded: names that the network takes over.
        reinitialized: the class head, where classes differ; it stays random.
        missing: names of the network that the file lacks; they stay random.
        mismatched: names that have another shape, with the file's and the network's; they stay random.
        unexpected: names of the file that the network has not.
        hint: what else to try if the backbone is not covered.
    """

    source: str
    kind: str
    loaded: list[str] = field(default_factory=list)
    reinitialized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: dict[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    unexpected: list[str] = field(default_factory=list)
    hint: str = ""

    def rows(self) -> dict[str, list[str]]:
        """What there is to tell -> names; mismatched ones with their shapes."""
        shapes = [f"{name} {given} for {wanted}" for name, (given, wanted) in self.mismatched.items()]
        rows = {
            "loaded": self.loaded,
            "class head, re-initialised": self.reinitialized,
            "missing, stay random": self.missing,
            "other shape, stay random": shapes,
            "unexpected, not used": self.unexpected,
        }
        return {what: names for what, names in rows.items() if names or what == "loaded"}

    def gaps(self) -> list[str]:
        """What the backbone lacks of its parameters and statistics, in words."""
        gaps = [f"{name} is missing" for name in self.missing if name.startswith("backbone.")]
        return gaps + [
            f"{name} has shape {given} instead of {wanted}"
            for name, (given, wanted) in self.mismatched.items()
            if name.startswith("backbone.")
        ]

    def check_backbone(self) -> None:
        """Make sure that the backbone gets all its parameters and statistics.

        Raises:
            UserError: it does not.
        """
        if gaps := self.gaps():
            which = f"{gaps[0]}; {len(gaps)} differences"
            raise UserError(f"weights={self.source} ({self.kind}) does not cover the backbone ({which}): {self.hint}")


def compare(wanted: Mapping[str, Tensor], weights: Weights, classes: Sequence[str] | None = None) -> LoadReport:
    """Sort all names.

    Args:
        wanted: the network's state dict.
        weights: the file's.
        classes: names of the classes that the network is for; with others the class head is not taken over.
    """
    given = weights.state
    other_shape = {
        name: (list(given[name].shape), list(tensor.shape))
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    }
    head = [name for name in wanted if name.startswith(CLASS_HEAD) and name in given]
    other_classes = None not in (classes, weights.classes) and tuple(classes or ()) != weights.classes
    reinitialized = head if other_classes or any(name in other_shape for name in head) else []
    return LoadReport(
        source=weights.source,
        kind=weights.kind,
        loaded=[name for name in wanted if name in given and name not in (*other_shape, *reinitialized)],
        reinitialized=reinitialized,
        missing=[name for name in wanted if name not in given and not name.endswith(_COUNTER)],
        mismatched={name: shapes for name, shapes in other_shape.items() if name not in reinitialized},
        unexpected=[*(name for name in given if name not in wanted), *weights.leftovers],
        hint=_hint(wanted, given),
    )


def _hint(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    if any(name.startswith("backbone.model.") for name in wanted):
        return "backbone=timm takes files of timm's with backbone.pretrained=FILE"
    name = guess_backbone(given)
    if name is None or name == guess_backbone(wanted):
        return "give the whole weights of the backbone that is chosen"
    return f"it looks like {name}, choose backbone={name} or other weights"


def show_report(report: LoadReport, console: Console | None = None) -> None:
    """Print the table, or log a line per row if nobody sits at a terminal. All names are in the log at level DEBUG."""
    console = console or Console()
    counts = "; ".join(f"{what}: {len(names)}" for what, names in report.rows().items())
    log.info("weights from %s (%s): %s", report.source, report.kind, counts)
    if console.is_terminal:
        console.print(report_table(report))
    else:
        for what, names in report.rows().items():
            log.info("%s: %d (%s)", what, len(names), summarize(names))
    for what, names in report.rows().items():
        for name in names:
            log.debug("%s: %s", what, name)


def report_table(report: LoadReport) -> Table:
    """One row per fate."""
    table = Table("weights", title=f"{escape(report.source)}: {escape(report.kind)}", header_style="bold")
    table.add_column("number", justify="right")
    table.add_column("which")
    for what, names in report.rows().items():
        table.add_row(what, str(len(names)), escape(summarize(names)))
    return table


def summarize(names: Sequence[str]) -> str:
    """A few names, or the parts of the network that many names belong to, with their numbers."""
    if len(names) <= _SHOWN:
        return ", ".join(names) or "none"
    parts = Counter(name.split(".")[0] for name in names)
    if any("[" in name for name in names) or len(parts) == len(names):
        return ", ".join([*names[:_SHOWN], "..."])
    first = {part: next(name for name in names if name.split(".")[0] == part) for part in parts}
    texts = [first[part] if number == 1 else f"{part}.* {number}" for part, number in parts.items()]
    return ", ".join([*texts[:8], *(["..."] if len(texts) > 8 else [])])
