"""What stands between the command line and the job: checks whose errors name the cure."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, OverrideParseException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.types import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"

_NOT_TAKEN_OVER = ("resume", "weights", "output_dir", "hydra", "sweep", "trainer", "logger", "callbacks")
"""Choices of a training run that say nothing about evaluating or using its result."""


_RENAMED = {"recipe.batch_size": "recipe.global_batch_size"}
"""Keys in the command lines of older checkpoints -> today's."""


def key_of(override: str) -> str:
    """The key that a command-line override changes: `+recipe.lr=1` -> `recipe.lr`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


_OPTIONAL = ("hydra/launcher/joblib", "hydra/launcher/submitit", "hydra/sweeper/optuna")
"""Plugins of Hydra's that requirements-sweep.txt installs."""


def folder_name(text: object) -> str:
    """Make something that reads well in a folder's name: `ablation-[no_csm,fpn]` -> `ablation-no_csm+fpn`."""
    name = re.sub(r"[\s'\"\[\]{}()]", "", str(text)).replace(",", "+")
    return re.sub(r"[^\w.+=@-]", "-", name)[:120].rstrip(".")


def sweep_name(overrides: Sequence[str], otherwise: str) -> str:
    """The name of a sweep's folder: what is chosen by `sweep=`, or something else if nothing is."""
    chosen = [o.split("=", 1)[1] for o in overrides if key_of(o) == "sweep"]
    return folder_name(chosen[-1]) if chosen else otherwise


def job_folder(number: int, overrides: str) -> str:
    """The name of a job's folder in a sweep's: its number and what is its own."""
    return f"{number}_{folder_name(overrides)}".rstrip("_")


# Config files name folders with them. Every process that runs a job, of whatever launcher, imports this module.
OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)


def is_override(argument: str) -> bool:
    """Whether a command-line argument is an override and no option."""
    return not argument.startswith("-") and ("=" in argument or argument.startswith("~"))


def take_over_choices(arguments: Sequence[str]) -> list[str]:
    """Put the overrides that a checkpoint was trained with before the command line's own, which win.

    Args:
        arguments: the command line, with `checkpoint=PATH`.

    Raises:
        UserError: the file is no checkpoint of ours.
    """
    paths = [a.split("=", 1)[1] for a in arguments if is_override(a) and key_of(a) == "checkpoint"]
    if not paths:
        return list(arguments)
    own = {key_of(a) for a in arguments if is_override(a)}
    trained = [renamed(o) for o in read_checkpoint(paths[-1].strip("'\"")).overrides]
    taken = [o for o in trained if key_of(o) not in own and key_of(o).split(".")[0] not in _NOT_TAKEN_OVER]
    return [*taken, *arguments]


def renamed(override: str) -> str:
    """An override of an older checkpoint, by today's names."""
    key, equals, value = override.partition("=")
    return f"{_RENAMED.get(key, key)}{equals}{value}"


def check_composes(job: str, arguments: Sequence[str]) -> DictConfig:
    """Compose the experiment once, so that a mistake on the command line becomes one clear line.

    Returns:
        The experiment, Hydra's own part included.

    Raises:
        UserError: a key or a choice does not exist, or an override cannot be parsed.
    """
    overrides = [a for a in arguments if is_override(a)]
    if len(overrides) < len(arguments) and not any(a.startswith("-") for a in arguments):
        stray = next(a for a in arguments if not is_override(a))
        raise UserError(f"{stray!r} is no override: write key=value, e.g. task=panoptic")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose(job, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error, job)) from error


def explain(error: Exception, job: str) -> str:
    """One line for one of Hydra's errors, with the nearest key or choice where one is near.

    Args:
        error: what Hydra raised while it composed.
        job: name of the entry point's config.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r} ({text.splitlines()[0]}): write key=value, and quote special characters"
    if match := re.search(r"Could not (?:override|find) '([^']+)'", text):
        wrong = match[1]
        if pair := _impossible_pair(wrong):
            return pair
        if wrong.startswith(_OPTIONAL):
            return f"{wrong} needs an optional package: pip install -r requirements-sweep.txt"
        if options := re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", text):
            choices = options[1].split()
            hint = _nearest(wrong.split("/")[-1], choices)
            return f"there is no {'='.join(wrong.rsplit('/', 1))}{hint}; choose one of: {', '.join(choices)}"
        return f"there is no key {wrong}{_nearest(wrong, _all_keys(hydra.compose(job)))}; see them all with --cfg job"
    return " ".join(text.split())


def _impossible_pair(recipe: str) -> str | None:
    """What to say if `recipe/<dataset>_<task>` is missing: which tasks that data set has."""
    for dataset in _choices("dataset"):
        for task in _choices("task"):
            if recipe == f"recipe/{dataset}_{task}":
                known = [f"task={t}" for t in _choices("task") if f"{dataset}_{t}" in _choices("recipe")]
                return f"dataset={dataset} has no task={task}: choose {' or '.join(known)}"
    return None


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _nearest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _all_keys(config: DictConfig) -> list[str]:
    def walk(node: Any, prefix: str) -> Iterator[str]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield f"{prefix}{key}"
                yield from walk(value, f"{prefix}{key}.")

    return list(walk(OmegaConf.to_container(config, resolve=False), ""))


def user_error_behind(error: BaseException | None) -> str | None:
    """The one line to show if the cause of an error is a user's, None if it is a bug."""
    while error is not None:
        if isinstance(error, UserError):
            # From a loader's worker it comes with the worker's traceback before it.
            return str(error).strip().splitlines()[-1].split("UserError: ")[-1]
        if isinstance(error, MisconfigurationException | OmegaConfBaseException):
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None
