"""Composing an experiment, and one line with the cure for whatever goes wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, OverrideParseException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pem_lightning.installation import CONF, install_command
from pem_lightning.types import UserError, did_you_mean

_BACKBONES: dict[str, dict[str, str]] = {
    **{f"resnet{depth}": {"norm": "${recipe.resnet_norm}"} for depth in (18, 34, 50, 101)},
    **{f"stdc{number}": {"norm": "batch"} for number in (1, 2)},
    **{(name := f"efficientnet_lite{number}"): {"norm": "batch", "weights": name} for number in (0, 1, 2)},
}
"""Choices of `backbone=` besides conf/backbone -> their normalisation, and their default of `weights=`."""

for _name, _choice in _BACKBONES.items():
    _node = {"name": _name, "module": "${.name}", **_choice}
    ConfigStore.instance().store(group="backbone", name=_name, node=_node)

_PLUGINS = ("hydra/launcher/joblib", "hydra/launcher/submitit", "hydra/sweeper/optuna")
"""Choices that need the extra `sweep`."""


def folder_name(text: object) -> str:
    """Make a readable folder name: `0_ablation-[no_csm,fpn]` -> `0_ablation-no_csm+fpn`."""
    name = re.sub(r"[\s'\"\[\]{}()]", "", str(text)).replace(",", "+")
    return re.sub(r"[^\w.+=@-]", "-", name)[:120].rstrip("._")


# Config files use it. Every process that runs a job of a sweep imports this module.
OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def key_of(override: str) -> str:
    """The key that a command-line override changes: `+recipe.lr=1` -> `recipe.lr`."""
    return override.split("=", 1)[0].lstrip("+~").split("@")[0]


@contextmanager
def configs() -> Iterator[None]:
    """Point Hydra at conf/, unless a surrounding block has done so."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with hydra.initialize_config_dir(str(CONF), job_name="run", version_base="1.3"):
        yield


@contextmanager
def own_configs() -> Iterator[None]:
    """The same inside of somebody else's Hydra app, whose state is put back."""
    app, runtime, base = GlobalHydra.instance(), JobRuntime.instance(), VersionBase.instance()
    theirs, name, version_base = app.hydra, runtime.get("name"), base.getbase()
    app.clear()
    try:
        with configs():
            yield
    finally:
        GlobalHydra.set_instance(app)
        app.hydra = theirs
        runtime.set("name", name)
        base.version_base = version_base


def compose(job: str, overrides: Iterable[str]) -> DictConfig:
    """Compose an experiment, Hydra's own part included.

    Args:
        job: name of the entry point's config: train, evaluate or predict.
        overrides: of the command line.

    Raises:
        UserError: a key or a choice does not exist, or an override cannot be parsed.
    """
    with configs():
        try:
            return hydra.compose(job, list(overrides), return_hydra_config=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error, job)) from error


def explain(error: Exception, job: str) -> str:
    """One line for an error of Hydra's while it composed `job`, with the nearest key or choice where one is near."""
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0]
        return f"cannot read {error.override!r} ({reason}): write key=value, and quote special characters"
    text = str(error) or str(error.__cause__)
    match = re.search(r"Could not (?:override|find) '([^']+)'", text)
    if match is None:
        return " ".join(text.split())
    wrong = match[1]
    if wrong.startswith(_PLUGINS):
        return f"{wrong} needs an optional package: {install_command('sweep')}"
    if options := re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", text):
        choices = options[1].split()
        hint = did_you_mean(wrong.split("/")[-1], choices)
        return f"there is no {'='.join(wrong.rsplit('/', 1))}{hint}; choose one of: {', '.join(choices)}"
    return f"there is no key {wrong}{did_you_mean(wrong, _keys(compose(job, [])))}; see them all with --cfg job"


def _keys(config: DictConfig) -> Iterator[str]:
    def walk(node: Any, prefix: str) -> Iterator[str]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield f"{prefix}{key}"
                yield from walk(value, f"{prefix}{key}.")

    return walk(OmegaConf.to_container(config, resolve=False), "")


def user_error_behind(error: BaseException | None) -> str | None:
    """The one line to show if an error's cause is a user's mistake, None if it is a bug."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, MisconfigurationException | OmegaConfBaseException):
            return " ".join(str(error).split())
        error = error.__cause__ or error.__context__
    return None
