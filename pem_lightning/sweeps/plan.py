"""Before a sweep: which jobs it has, whether every one of them composes, and where they go."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from pem_lightning.config import CONF, check_composes, explain, is_override, key_of
from pem_lightning.errors import UserError
from pem_lightning.sweeps.devices import parallel_jobs

_NO_RUN = {"--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--shell-completion", "-sc", "--version"}
"""Options of Hydra's that run nothing."""


class Sweep(NamedTuple):
    """A sweep that may start.

    Attributes:
        directory: holds one folder per job.
        arguments: the command line for Hydra.
    """

    directory: Path
    arguments: list[str]


def plan_sweep(job: str, arguments: Sequence[str]) -> Sweep | None:
    """Check a sweep before its first job, so that a mistake costs a second and not hours.

    Every value of every swept key is composed once; Hydra composes their combinations before it starts.

    Args:
        job: name of the entry point's config.
        arguments: the command line.

    Returns:
        None if the command line asks for a single run.

    Raises:
        UserError: something does not compose.
    """
    if _NO_RUN & {a.split("=", 1)[0] for a in arguments}:
        return None
    options = [a for a in arguments if not is_override(a)]
    given = _values([a for a in arguments if is_override(a)], job)
    first = [value[0] for value in given.values()]
    cfg = check_composes(job, [*first, *options])
    if not {"-m", "--multirun"} & set(options) and cfg.hydra.mode != RunMode.MULTIRUN:
        return None
    if cfg.get("resume") is not None:
        raise UserError(
            "resume= is for single runs; a sweep goes on when it is started again in its old hydra.sweep.dir"
        )
    parameters = OmegaConf.to_container(cfg.hydra.sweeper, resolve=False).get("params") or {}  # type: ignore[union-attr]
    values = _values([f"{key}={value}" for key, value in parameters.items()], job) | given
    base = {key: value[0] for key, value in values.items()}
    for key, choices in values.items():
        for choice in choices[1:] if key in given else choices:
            check_composes(job, list((base | {key: choice}).values()))
    fixed = [key.lstrip("+~").split("@")[0] for key, choices in values.items() if len(choices) == 1]
    own = {key_of(a) for a in arguments if is_override(a)}
    directory = Path(cfg.hydra.sweep.dir)
    added = [f"hydra.sweep.dir='{directory}'"] if "hydra.sweep.dir" not in own else []
    excluded = "hydra.job.config.override_dirname.exclude_keys"
    if excluded not in own:  # what all jobs have in common is no part of their folders' names
        added.append(f"{excluded}=[{','.join(repr(key) for key in fixed)}]")
    if cfg.hydra.runtime.choices["hydra/launcher"] == "joblib" and "hydra.launcher.n_jobs" not in own:
        added += [
            f"hydra.launcher.n_jobs={parallel_jobs()}",
            "hydra.launcher.pre_dispatch=n_jobs",
            "hydra.launcher.batch_size=1",
        ]
    overrides = [a for a in arguments if is_override(a)]
    return Sweep(directory, [*options, *overrides, *added])  # an option between them is more than argparse understands


def _values(overrides: list[str], job: str) -> dict[str, list[str]]:
    """Every override's values by its key; of an interval, which Optuna samples, both ends."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
            return {o.get_key_element(): _values_of(o) for o in parser.parse_overrides(overrides)}
        except HydraException as error:
            raise UserError(explain(error, job)) from error


def _values_of(override: Override) -> list[str]:
    key = override.get_key_element()
    if not override.is_sweep_override():
        assert override.input_line is not None
        return [override.input_line]
    value: Any = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={end}" for end in (value.start, value.end)]
    return [f"{key}={element}" for element in override.sweep_string_iterator()]
