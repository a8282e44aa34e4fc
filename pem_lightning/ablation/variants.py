"""What a run changes against the default, in a few words.

Words come from the composed experiment, not from the command line: `ablation=no_csm` and `network.csm=false` are the
same variant.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from pem_lightning.ablation.runs import Run, parts_of
from pem_lightning.cli.errors import CONF


class Term(NamedTuple):
    """One change against the default.

    Attributes:
        family: what it belongs to, one of `FAMILIES`.
        rank: its place within the family.
        words: such as "no masking" or "optimizer.lr=0.0003".
    """

    family: str
    rank: int
    words: str


FAMILIES = ("attention", "pixel decoder", "supervision", "depth", "queries", "backbone", "other")

_RULES: tuple[tuple[dict[str, Any], Term], ...] = (
    ({"attention": "dot_product", "masked": False}, Term("attention", 4, "cross-attention")),
    ({"attention": "dot_product"}, Term("attention", 3, "masked cross-attention")),
    ({"attention": "mean"}, Term("attention", 1, "no prototype")),
    ({"masked": False}, Term("attention", 0, "no masking")),
    ({"interaction": False}, Term("attention", 2, "no interaction")),
    ({"pixel_decoder": "msdeform", "pyramid_channels": 256}, Term("pixel decoder", 3, "MSDeformAttn")),
    ({"pixel_decoder": "msdeform"}, Term("pixel decoder", 3, "MSDeformAttn")),
    ({"csm": False, "deformable": False}, Term("pixel decoder", 2, "FPN")),
    ({"csm": False}, Term("pixel decoder", 0, "no CSM")),
    ({"deformable": False}, Term("pixel decoder", 1, "no deformable")),
    ({"auxiliary": "never"}, Term("supervision", 0, "no deep supervision")),
)
"""Changed arguments of `build_pem` -> what that is called; the first rule that fits takes its arguments."""

ABLATIONS = ("attention", "pixel decoder", "supervision")
"""Families of the paper's argument: always in a variant's name, even if all runs of a table share it."""

_NETWORK_DEFAULTS = {
    "attention": "prototype",
    "masked": True,
    "interaction": True,
    "pixel_decoder": "pem",
    "csm": True,
    "deformable": True,
    "auxiliary": "training",
}
"""What a run means that was trained before the argument existed."""

_SCALE = ("global_batch_size", "max_steps", "train_transform", "eval_transform")
"""Of the recipe: runs that differ in it are not compared."""
_BOOKKEEPING = (
    "val_interval",
    "checkpoint_interval",
    "micro_batch_size",
    "compile",
    "channels_last",
    "optimizer.fused",
)
_SAID_BY_THE_NETWORK = ("num_queries", "resnet_norm")
_PLACES = ("root", "num_workers", "cache", "on_error")
"""Of the data set: where it is and how it is read."""


def setting_of(run: Run) -> str:
    """What has to agree before numbers may be compared: data, task, crops, batch, steps and evaluation, as JSON."""
    recipe = {key: run.config["recipe"].get(key) for key in _SCALE}
    setting = {"max_steps": run.max_steps, "recipe": recipe, "evaluation": _setting(run.written)}
    return json.dumps(setting, sort_keys=True, default=str)


def special_of(run: Run) -> list[str]:
    """In which words the setting differs from the default of data set and task, but for steps, batch and crops."""
    ours, default = _setting(run.written), _setting(parts_of(_reference(*_reference_choices(run)), resolve=False))
    changes = _differences(dict(_flatten(ours, "")), dict(_flatten(default, "")))
    return [words.replace("dataset.datamodule.", "dataset.") for _, words in changes]


def terms_of(run: Run) -> tuple[Term, ...]:
    """Everything a run changes against the default experiment of its data set and task, in a fixed order."""
    dataset, task, backbone = _reference_choices(run)
    own, default = _reference(dataset, task, backbone), _reference(dataset, task, None)
    terms = [*_network_terms(run.config["network"], parts_of(own, resolve=True)["network"])]
    if run.backbone != default.backbone.name:
        terms.append(Term("backbone", 0, run.backbone))
    reference = parts_of(own, resolve=False)
    terms += _other_terms(run.written["backbone"], reference["backbone"], "backbone.", ("name", "norm", "module"))
    terms += _other_terms(run.written["criterion"], reference["criterion"], "criterion.", ())
    terms += _other_terms(
        run.written["recipe"], reference["recipe"], "", (*_SCALE, *_BOOKKEEPING, *_SAID_BY_THE_NETWORK)
    )
    if run.weights is not None:
        terms.append(Term("other", 2, f"weights={run.weights}"))
    return tuple(sorted(terms, key=lambda term: (FAMILIES.index(term.family), term.rank, term.words)))


def _setting(written: Mapping[str, Any]) -> dict[str, Any]:
    dataset = {k: v for k, v in written["dataset"].items() if k not in _PLACES}
    inference = {key: written["inference"].get(key) for key in ("scales", "flip")}
    return {"dataset": dataset, "task": written["task"], "inference": inference}


def _network_terms(network: Mapping[str, Any], reference: Mapping[str, Any]) -> Iterator[Term]:
    ours: dict[str, Any] = {**_NETWORK_DEFAULTS, **network}
    default = {**_NETWORK_DEFAULTS, **reference}
    changed = {k: v for k, v in ours.items() if default.get(k) != v and k not in ("backbone", "kernel")}
    for wanted, term in _RULES:
        if all(key in changed and changed[key] == value for key, value in wanted.items()):
            changed = {k: v for k, v in changed.items() if k not in wanted}
            yield term
    for key, family, one, many in (
        ("num_layers", "depth", "layer", "layers"),
        ("num_queries", "queries", "query", "queries"),
    ):
        if key in changed:
            count = changed.pop(key)
            yield Term(family, count, f"{count} {one if count == 1 else many}")
    for key, value in changed.items():
        yield Term("other", 0, f"{key}={_show(value)}")


def _other_terms(ours: Any, default: Any, prefix: str, ignored: tuple[str, ...]) -> Iterator[Term]:
    flat = (dict(_flatten({k: v for k, v in part.items() if k not in ignored}, prefix)) for part in (ours, default))
    for key, words in _differences(*flat):
        if key not in ignored:
            yield Term("other", 1, words)


def _differences(ours: Mapping[str, Any], default: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys, and "key=value" for what differs."""
    for key in sorted({*ours, *default}):
        if key not in ours:
            if default[key] is not None:  # else it is a newer option that the run did without
                yield key, f"no {key}"
        elif key not in default or ours[key] != default[key]:
            yield key, f"{key}={_show(ours[key])}"


def _flatten(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)


def _reference_choices(run: Run) -> tuple[str | None, str | None, str | None]:
    """Data set, task and backbone as Hydra's options, None for those that conf/ does not have (any more)."""
    names = {"dataset": run.dataset, "task": run.task, "backbone": str(run.config["backbone"]["name"])}
    found = (str(run.choices.get(group, name)) for group, name in names.items())
    dataset, task, backbone = (
        option if (CONF / group / f"{option}.yaml").is_file() else None
        for group, option in zip(names, found, strict=True)
    )
    return dataset, task, backbone


@lru_cache
def _reference(dataset: str | None, task: str | None, backbone: str | None) -> DictConfig:
    """The experiment that the command line changes, as conf/ has it today."""
    options = {"dataset": dataset, "task": task, "backbone": backbone}
    overrides = [f"{group}={option}" for group, option in options.items() if option is not None]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return hydra.compose("train", overrides)
        except HydraException:  # such as a pair of data set and task without a recipe
            return hydra.compose("train")
