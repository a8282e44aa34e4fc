"""What `--help` says of a job: its settings and choices with the comments of conf/, and examples."""

from __future__ import annotations

import re
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from pem_lightning.__main__ import EXAMPLES, JOBS
from pem_lightning.cli.errors import configs
from pem_lightning.installation import CONF, job_command

_OF_TRAINING = ("ablation", "backbone", "recipe", "scale")
"""Groups of conf/experiment.yaml whose choice a checkpoint brings."""


def job_usage(job: str) -> str:
    """About a screen.

    Args:
        job: train, evaluate, predict, export or app.
    """
    command, own, shared = job_command(job), _read(job), _read("experiment")
    groups = _choices(own, shared)
    parts = {
        f"usage: {command} KEY=VALUE ...": [JOBS[job]],
        "settings, as conf/ has them (???: to be given; null: none):": _plain(own.partition("- _self_\n")[2]),
    }
    if job == "train":
        title = "the recipe (recipe.KEY=VALUE), with the paper's values for Cityscapes; others: conf/recipe/:"
        recipe = _read("recipe/cityscapes")
        parts[title] = [*_plain(recipe), f"optimizer.lr: {OmegaConf.create(recipe).optimizer.lr}"]
    else:
        inference = re.search(r"^inference:\n((?: .*\n)+)", shared, re.MULTILINE)
        parts["how the network runs (inference.KEY=VALUE):"] = inference[1].splitlines() if inference else []
        groups = {group: options for group, options in groups.items() if group not in _OF_TRAINING}
    width = max(map(len, groups))
    examples = [line for line in EXAMPLES.splitlines() if f"pem {job}" in line]
    parts |= {
        "choices (GROUP=NAME):": [f"{group:{width}}  {options}" for group, options in groups.items()],
        "examples:": [line.replace(f"pem {job}", command) for line in examples],
        "more:": [
            f"{command} --cfg job      the whole experiment: every key can be changed",
            f"{command} -m KEY=A,B     all combinations, one after the other",
            f"{command} --hydra-help   options of Hydra",
        ],
    }
    blocks = (("", title, *(f"  {line.strip()}" for line in lines)) for title, lines in parts.items() if lines)
    return "\n".join(line for block in blocks for line in block).removeprefix("\n")


def _read(name: str) -> str:
    return (CONF / f"{name}.yaml").read_text(encoding="utf-8")


def _plain(text: str) -> list[str]:
    """The lines of a config file that set plain values, and its comments."""
    lines = [line for line in text.splitlines() if re.match(r"\w+: |#", line)]
    return [line for line in lines if not line.startswith(("job:", "output_dir:"))]


def _choices(*texts: str) -> dict[str, str]:
    """The groups in the defaults of config files, by name, each with its options."""
    defaults = [entry for text in texts for entry in OmegaConf.create(text).defaults]
    groups = sorted(str(key) for entry in defaults if OmegaConf.is_dict(entry) for key in entry)
    with configs():
        app: Any = GlobalHydra.instance().hydra
        return {group: ", ".join(app.config_loader.get_group_options(group)) for group in groups}
