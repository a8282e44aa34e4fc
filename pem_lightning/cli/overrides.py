"""Going on with a training: which checkpoint, with which choices, in which folder."""

from __future__ import annotations

import csv
import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig

from pem_lightning.callbacks.visualization import log_files
from pem_lightning.checkpoints import Checkpoint, read_checkpoint
from pem_lightning.cli.errors import is_override, key_of, renamed
from pem_lightning.files import remove_leftovers, write_file
from pem_lightning.training.resume import LAST, PREVIOUS
from pem_lightning.types import UserError

_NOT_TAKEN_OVER = ("resume", "output_dir", "hydra", "sweep")
"""Choices of the interrupted run that do not belong to the resumed one."""


def stay_in_resumed_run(cfg: DictConfig, arguments: Sequence[str]) -> list[str]:
    """Let a resumed run go on as it began: in its own folder, and with the choices of its command line.

    `resume=PATH` goes on from a checkpoint, `resume=last` from the newest run's with the same data set, task and
    backbone, `resume=auto` from the one in `hydra.run.dir`, or starts a new run if there is none. A `last.ckpt` that is
    damaged is replaced by the one before it, loudly. Overrides of the command line win over those of the interrupted
    run. An `auto` run that is finished ends the process with exit code 0.

    Args:
        cfg: the composed experiment, Hydra's own part included.
        arguments: the command line.

    Raises:
        UserError: there is nothing to resume, or the command line contradicts it.
    """
    if cfg.get("resume") is None:
        return list(arguments)
    own = {key_of(a) for a in arguments if is_override(a)}
    rest = [a for a in arguments if not (is_override(a) and key_of(a) == "resume")]
    path = _path_to_resume(cfg, own)
    if path is None:
        return rest
    checkpoint = sound_checkpoint(path)
    _check_same_start(cfg, own, checkpoint)
    if cfg.resume == "auto" and checkpoint.step >= cfg.trainer.max_steps > 0:
        _end(
            f"{checkpoint.path} is trained to step {checkpoint.step} of {cfg.trainer.max_steps} already: nothing to do"
        )
    trained = [renamed(o) for o in checkpoint.overrides]
    taken = [o for o in trained if not {key_of(o), key_of(o).split(".")[0]} & {*own, *_NOT_TAKEN_OVER}]
    run = path.parent.parent
    if (run / ".hydra").is_dir() and "hydra.run.dir" not in own:
        rest.append(f"hydra.run.dir='{run}'")
    return [*taken, *rest, f"resume='{checkpoint.path}'"]


def _path_to_resume(cfg: DictConfig, own: set[str]) -> Path | None:
    """What `resume=` means."""
    if cfg.resume == "auto":
        if "hydra.run.dir" not in own:
            raise UserError(
                "resume=auto goes on in the run's folder, which is a new one at every start unless you name it: "
                "say hydra.run.dir=outputs/... as well"
            )
        folder = Path(cfg.hydra.run.dir) / "checkpoints"
        return folder / LAST if any((folder / name).exists() for name in (LAST, PREVIOUS)) else None
    if cfg.resume == "last":
        runs = Path(cfg.hydra.run.dir).parent
        found = [path for name in (LAST, PREVIOUS) for path in runs.glob(f"*/checkpoints/{name}")]
        if not found:
            raise UserError(f"resume=last finds no */checkpoints/{LAST} in {runs}: start without resume")
        return max(found, key=lambda path: path.stat().st_mtime).with_name(LAST)
    return Path(cfg.resume)


def sound_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of which every byte is in order, or else the one that was saved before it.

    Raises:
        UserError: neither can be read.
    """
    problem = _what_is_wrong(path)
    before = path.with_name(PREVIOUS)
    if problem is None:
        return read_checkpoint(path)
    if path.name != LAST or not before.exists():
        raise UserError(problem)
    if also := _what_is_wrong(before):
        raise UserError(f"neither can be resumed: {problem}; {also}")
    checkpoint = read_checkpoint(before)
    print(f"WARNING: {problem}; GOING ON FROM {before}, which is of step {checkpoint.step}", file=sys.stderr)
    return checkpoint


def _what_is_wrong(path: Path) -> str | None:
    """One line about a checkpoint that cannot be resumed; None if it can."""
    if not path.is_file():
        return f"checkpoint {path} does not exist"
    try:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():  # PyTorch does not look at the check sums
                return f"{path} is damaged ({broken})"
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        return f"{path} is damaged, or no checkpoint ({error})"
    return None if names else f"{path} is empty"


def _check_same_start(cfg: DictConfig, own: set[str], checkpoint: Checkpoint) -> None:
    """The same command may be given again with `resume=`, but it cannot change where the run began."""
    trained = checkpoint.config
    if "weights" in own and cfg.weights is not None and str(cfg.weights) != str(trained.get("weights")):
        raise UserError("weights= starts a new training and resume= goes on with an old one: leave one of them out")
    if "seed" in own and cfg.seed != trained.get("seed", cfg.seed):
        raise UserError(
            f"{checkpoint.path} was started with seed={trained['seed']}, by which its data are ordered and augmented: "
            f"leave seed={cfg.seed} out"
        )


def _end(message: str) -> NoReturn:
    print(message)
    sys.exit(0)


@rank_zero_only
def tidy_up(folder: Path, step: int | None) -> None:
    """Make a run's folder ready: without half-written files, and with logs that end where training begins.

    Args:
        folder: the run's.
        step: where a resumed run goes on; None for a new run.
    """
    remove_leftovers(folder)
    earlier = log_files(folder / "csv")
    if step is None:
        for path in earlier[:-1]:
            path.unlink()
        return
    merged = _merge(earlier, step)
    if merged is None:
        return
    target = folder / "csv" / f"metrics_before_step_{step:07d}.csv"
    write_file(target, merged)
    for path in earlier:
        if path != target:
            path.unlink(missing_ok=True)


def _merge(paths: Sequence[Path], step: int) -> str | None:
    """One csv log of several: a row per step, of which there are `step`; later files win. None if there is nothing."""
    rows: dict[int, dict[str, str]] = {}
    for path in paths:
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # A row that a kill or a full disk cut off has too few fields, or too many.
                if None in row or None in row.values() or not row["step"].isdigit() or int(row["step"]) >= step:
                    continue
                rows.setdefault(int(row["step"]), {}).update({k: v for k, v in row.items() if v})
    if not rows:
        return None
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({name for row in rows.values() for name in row}), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows[number] for number in sorted(rows))
    return text.getvalue()
