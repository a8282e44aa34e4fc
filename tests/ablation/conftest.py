"""Folders like those that train.py leaves, made in milliseconds."""

import csv
import json
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf, open_dict

from pem_lightning.cli.errors import CONF


def write_log(path, rows):
    """A csv log as Lightning writes it: the union of all columns, empty where a row has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["epoch", *sorted({name for _, values in rows for name in values}), "step"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({"epoch": 0, "step": step - 1, **values} for step, values in rows)


def write_run(folder, *overrides, values=(), steps=600, interval=150, finished=None, **metrics):
    """Write a run.

    Args:
        folder: of the run.
        overrides: as on the command line.
        values: of the main metric, one per validation; further metrics by their name, with the same number.
        steps: up to where the loss is logged.
        interval: steps between validations.
        finished: whether it wrote its metrics.json; None for yes if all steps are done.
    """
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", list(overrides), return_hydra_config=True)
    with open_dict(config):
        choices, _ = dict(config.hydra.runtime.choices), config.pop("hydra")
    hydra_folder = Path(folder) / ".hydra"
    hydra_folder.mkdir(parents=True)
    OmegaConf.save(config, hydra_folder / "config.yaml")
    OmegaConf.save({"hydra": {"runtime": {"choices": choices}}}, hydra_folder / "hydra.yaml")
    OmegaConf.save(list(overrides), hydra_folder / "overrides.yaml")
    main = config.task.monitor
    columns = {main: values, **{f"val/{name}": numbers for name, numbers in metrics.items()}}
    rows = [(step, {"train/loss": 100 / step}) for step in range(10, steps + 1, 10)]
    for i in range(len(values)):
        rows.append(((i + 1) * interval, {name: numbers[i] for name, numbers in columns.items()}))
    write_log(Path(folder) / "csv" / "metrics.csv", rows)
    if finished or (finished is None and steps >= config.recipe.max_steps):
        last = {name: numbers[-1] for name, numbers in columns.items() if numbers}
        content = {"step": steps, **last, "per_class": [{"class": str(i)} for i in range(19)]}
        (Path(folder) / "metrics.json").write_text(json.dumps(content))
    return Path(folder)


def write_sweep(folder):
    """Two seeds of the default, of three and of one layer, and one seed of another learning rate."""
    jobs = (
        ([], 0, 70.0),
        ([], 1, 72.0),
        (["network.num_layers=3"], 0, 66.0),
        (["network.num_layers=3"], 1, 69.0),
        (["network.num_layers=1"], 0, 60.0),
        (["network.num_layers=1"], 1, 61.0),
        (["recipe.optimizer.lr=3e-4"], 0, 65.0),
    )
    for number, (overrides, seed, last) in enumerate(jobs):
        rise = [last - 30, last - 10, last - 4, last]
        also = {"PQ_things": [v - 5 for v in rise], "PQ_stuff": [v + 5 for v in rise], "mIoU": [v + 9 for v in rise]}
        write_run(folder / str(number), *overrides, f"seed={seed}", values=rise, **also)
    return folder


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep")
