"""Overrides: paths are taken as they are; `resume=` and `checkpoint=` bring those of their training."""

from __future__ import annotations

import os
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from pem_lightning.checkpoints import Checkpoint, read_checkpoint, refuse_exported
from pem_lightning.cli.errors import compose, explain, key_of
from pem_lightning.types import UserError

_OF_THE_RUN = ("resume", "output_dir", "hydra", "sweep")
"""Choices of a training that say nothing about going on with it."""
_OF_TRAINING = (*_OF_THE_RUN, "debug", "weights", "trainer", "logger", "callbacks")
"""Choices of a training that say nothing about evaluating or using its result."""

_PATHS = {
    *("input", "output", "output_dir", "checkpoint", "weights", "resume", "pretrained", "save_predictions"),
    *("root", "cache", "train_json", "train_maps", "train_images", "val_json", "val_maps", "val_images"),
    *("default_root_dir", "dir", "subdir", "directory", "dirpath", "filename", "save_dir"),
}
"""Last parts of keys whose values are paths, such as `dataset.root` and `hydra.run.dir`."""

_READ_HERE = ("checkpoint", "resume", "weights", "seed", "hydra.run.dir")
"""Keys whose values are read before the experiment is composed."""


def literal_paths(overrides: Sequence[str], sweep: bool = False) -> list[str]:
    """Quote the values of keys for paths, so that Hydra takes them as they are, whatever characters they have.

    Where no file has the name, Hydra's own syntax still counts: quotes, escapes, `${...}`, `null`, a list for `input`;
    and in a sweep `a,b` and `choice(...)`.
    """
    return [_literal_path(override, sweep) for override in overrides]


def _literal_path(override: str, sweep: bool) -> str:
    key, equals, value = override.partition("=")
    group, _, name = key_of(override).rpartition(".")
    if not equals or key.startswith("~") or name not in _PATHS:
        return override
    return f"{key}={_literal(name, value, sweep and not group.startswith('hydra'))}"


def _literal(name: str, value: str, sweep: bool) -> str:
    try:
        parsed: Override | None = OverridesParser.create().parse_override(f"{name}={value}")
    except HydraException:
        parsed = None
    if not os.path.lexists(os.path.expanduser(value)):
        if parsed is not None and _is_syntax(name, value, parsed, sweep):
            return value
        if sweep and "," in value:
            return ",".join(_literal(name, part, sweep) for part in value.split(","))
        if name == "input" and value.startswith("[") and value.endswith("]"):
            return f"[{','.join(_literal(name, part.strip(), sweep) for part in value[1:-1].split(','))}]"
    plain = parsed is not None and parsed.value_type == ValueType.ELEMENT and str(parsed.value()) == value
    return value if plain and "${" not in value else quote(value)


def _is_syntax(name: str, value: str, parsed: Override, sweep: bool) -> bool:
    """Whether a value that names no file is meant in Hydra's syntax."""
    if parsed.is_sweep_override():
        return sweep
    meaning: Any = parsed.value()
    if isinstance(meaning, list):
        return name == "input"
    if isinstance(meaning, bool):
        return name == "pretrained"
    # On Windows a backslash is part of a path.
    escaped = value.startswith(("'", '"')) or (os.sep != "\\" and "\\" in value) or "${" in value
    return meaning is None or (isinstance(meaning, str) and escaped)


def quote(text: object) -> str:
    """Text as Hydra's grammar and OmegaConf read it unchanged, quoted."""
    escaped = re.sub(r"(\\*)\$\{", r"\1\1\\${", str(text))
    return QuotedString(escaped, Quote.single).with_quotes()


def parse(overrides: Sequence[str], job: str) -> list[Override]:
    """Parse a command line's overrides.

    Raises:
        UserError: one cannot be read.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise UserError(explain(error, job)) from error


def take_over(job: str, overrides: Sequence[str]) -> tuple[list[str], Checkpoint | None]:
    """Let the checkpoint that `resume=` or `checkpoint=` names bring the overrides that it was trained with.

    Those of the command line come after them and win. `resume=PATH` goes on from a checkpoint in its own folder,
    `resume=last` from the newest run's with the same data set, task and backbone, `resume=auto` from the one in
    `hydra.run.dir`, or starts a new run if there is none.

    Returns:
        The overrides to compose with, and the checkpoint, if there is one.

    Raises:
        UserError: the checkpoint cannot be used, or the command line contradicts it.
    """
    parsed = [o for o in parse(overrides, job) if not o.is_sweep_override()]
    values = OmegaConf.create({o.key_or_group: o.value() for o in parsed if o.key_or_group in _READ_HERE})
    if job != "train":
        if values.get("checkpoint") is None:
            return list(overrides), None
        checkpoint = read_checkpoint(str(values["checkpoint"]))
        return [*_brought(checkpoint, overrides, _OF_TRAINING), *overrides], checkpoint
    if values.get("resume") is None:
        return list(overrides), None
    rest = [o for o in overrides if key_of(o) != "resume"]
    path = _path_to_resume(str(values["resume"]), rest)
    if path is None:
        return rest, None
    checkpoint = sound_checkpoint(path)
    _check_same_start(checkpoint, values)
    run = path.parent.parent
    if (run / ".hydra").is_dir() and "hydra.run.dir" not in values:
        rest.append(f"hydra.run.dir={quote(run)}")
    elif path.parent.name == "checkpoints" and "output_dir" in map(key_of, checkpoint.overrides):
        rest.insert(0, f"output_dir={quote(run)}")  # which it was started with; another one on the command line wins
    return [*_brought(checkpoint, rest, _OF_THE_RUN), *rest, f"resume={quote(checkpoint.path)}"], checkpoint


def _brought(checkpoint: Checkpoint, overrides: Sequence[str], without: Sequence[str]) -> list[str]:
    given = {key_of(o) for o in overrides}
    return [o for o in checkpoint.overrides if key_of(o) not in given and key_of(o).split(".")[0] not in without]


def _path_to_resume(value: str, overrides: Sequence[str]) -> Path | None:
    """What `resume=` means; None for a run that `auto` starts."""
    from pem_lightning.training.resume import LAST, PREVIOUS

    if value not in ("auto", "last"):
        return Path(value)
    if value == "auto" and "hydra.run.dir" not in map(key_of, overrides):
        raise UserError(
            "resume=auto goes on in the run's folder, which is a new one at every start unless you name it: "
            "say hydra.run.dir=outputs/... as well"
        )
    folder = Path(compose("train", overrides).hydra.run.dir)
    if value == "auto":
        found = [path for name in (LAST, PREVIOUS) if (path := folder / "checkpoints" / name).exists()]
        return folder / "checkpoints" / LAST if found else None
    found = [path for name in (LAST, PREVIOUS) for path in folder.parent.glob(f"*/checkpoints/{name}")]
    if not found:
        raise UserError(f"resume=last finds no */checkpoints/{LAST} in {folder.parent}: start without resume")
    return max(found, key=lambda path: path.stat().st_mtime).with_name(LAST)


def _check_same_start(checkpoint: Checkpoint, values: DictConfig) -> None:
    """The same command may be given again with `resume=`, but it cannot change where the run began."""
    trained = checkpoint.config
    weights = values.get("weights")
    if weights is not None and str(weights) != str(trained.get("weights")):
        raise UserError("weights= starts a new training and resume= goes on with an old one: leave one of them out")
    if values.get("seed", seed := trained.get("seed", 0)) != seed:
        raise UserError(
            f"{checkpoint.path} was started with seed={seed}, by which its data are ordered and augmented: "
            f"leave seed={values['seed']} out"
        )


def sound_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint whose check sums are right, or else, with a warning, the one that was saved before it.

    Raises:
        UserError: neither can be read.
    """
    from pem_lightning.training.resume import LAST, PREVIOUS

    refuse_exported(path)
    problem = _damage(path)
    if problem is None:
        return read_checkpoint(path)
    before = path.with_name(PREVIOUS)
    if path.name != LAST or not before.exists():
        raise UserError(problem)
    if also := _damage(before):
        raise UserError(f"neither can be resumed: {problem}; {also}")
    checkpoint = read_checkpoint(before)
    print(f"WARNING: {problem}; GOING ON FROM {before}, which is of step {checkpoint.step}", file=sys.stderr)
    return checkpoint


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; None if nothing is."""
    if not path.is_file():
        return f"checkpoint {path} does not exist"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # PyTorch does not look at the check sums
            if broken is None and archive.namelist():
                return None
    except (OSError, zipfile.BadZipFile) as error:
        broken = str(error)
    return f"{path} is damaged ({broken or 'empty'})"
