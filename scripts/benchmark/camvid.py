"""PEM beside networks of segmentation_models_pytorch on CamVid: same backbone, weights, images and training budget.

Every network tries learning rates on the validation frames, trains with the best one, and is timed. What is finished
stays in --output, and the same command goes on from there. The test frames are touched with --test only, once.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from torch import nn

from pem_lightning.checkpoints import load_network, read_checkpoint
from pem_lightning.cli.build import build_datamodule
from pem_lightning.data.camvid import CAMVID
from pem_lightning.files import write_file
from pem_lightning.inference.optimize import fuse_batch_norms
from pem_lightning.inference.postprocess import TaskInference
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError
from scripts.benchmark import camvid_baselines, common
from scripts.benchmark.common import TOTAL, Lap, Times, quartiles

ROOT = Path(__file__).parents[2]
PEMS = {"pem": (), "pem_paper": ("network.mask_features=pyramid",)}
"""PEM as CamVid's recipe has it, and the paper's, by what each overrides."""
NETWORKS = (*PEMS, *camvid_baselines.ARCHITECTURES)
PATHS = ("plain", "fast path")
NO_PICTURES = tuple(f"callbacks.{name}=null" for name in ("panels", "confusion"))
SAVED_STEPS = 10
"""Between two checkpoints of PEM; a minute or two on two cores."""
START = """
import os, runpy, sys
from pem_lightning.processes import when_orphaned
when_orphaned(lambda: os._exit(1), grace=0.0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Starts a script that ends when the benchmark is killed: two trainings in one folder would spoil it."""
Results = dict[str, Any]


class Run(NamedTuple):
    """A training of a network."""

    network: str
    lr: float
    images: int
    folder: Path
    overrides: tuple[str, ...]  # of PEM's experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("data/CamVid"), help="of CamVid, see docs/data.md")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS, help="to compare")
    parser.add_argument("--images", type=common.positive, default=2400, help="of a training, seen one by one")
    parser.add_argument("--trial-images", type=common.positive, default=600, help="of a trial of a learning rate")
    rates: Any = {"nargs": "+", "type": float, "default": [4e-4, 1.2e-3]}
    parser.add_argument("--lrs", **rates, help="learning rates that the baselines try; a single one is not tried")
    parser.add_argument("--pem-lrs", **rates, help="learning rates that PEM tries")
    parser.add_argument("--batch", type=common.positive, default=4, help="crops of a step")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--workers", type=int, default=1, help="loading processes")
    parser.add_argument("--overrides", nargs="+", default=[], help="of the experiment, for all networks")
    parser.add_argument("--test", action="store_true", help="evaluate the trained networks on the test frames")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Do what is not done yet; returns a report. The picture is written here, as it is another one.

    Raises:
        UserError: data or a library are missing, the folder belongs to other settings, or a training fails.
    """
    options.device = "cpu"
    check(options)
    folder, found = options.output, {}
    for number, network in enumerate(options.networks, 1):
        title = f"network {number} of {len(options.networks)}, {network}"
        rates = dict.fromkeys(options.pem_lrs if network in PEMS else options.lrs)
        trials = {}
        for lr in rates if len(rates) > 1 else ():
            trial = plan(options, network, lr, options.trial_images, "trial")
            work = partial(train, trial, options)
            trials[lr] = stored(folder / f"{trial.folder.name}.json", work, f"{title}: trial of {lr:g}")["miou"]
        best = max(trials, key=lambda lr: trials[lr]) if trials else next(iter(rates))
        final = plan(options, network, best, options.images, "final")
        work = partial(train, final, options)
        numbers = stored(folder / f"{final.folder.name}.json", work, f"{title}: training with {best:g}")
        tested = folder / f"test_{network}_{best:g}.json"
        if options.test or tested.is_file():
            numbers["test"] = stored(tested, partial(test, final, options), f"{title}: the test frames")
        found[final] = {"trials": trials, **numbers}
    size, measured = measure(list(found), options)
    for one in found:
        found[one] |= measured[one.network]
    networks = {one.network: {"lr": one.lr, "images": one.images, **numbers} for one, numbers in found.items()}
    content = {"size": size, **settings(options), "networks": networks}
    write_file(folder / "camvid.json", json.dumps(content, indent=2) + "\n")
    write_file(folder / "camvid.png", draw(networks))
    return report(content, options), {}


def check(options: argparse.Namespace) -> None:
    """Raise a UserError for what would stop the benchmark later, or mix results of different settings."""
    if options.output is None:
        raise UserError("camvid needs --output FOLDER: there it goes on when it is started again")
    if min(options.images, options.trial_images) < options.batch:
        raise UserError(f"--images and --trial-images make no step of {options.batch}: raise them or lower --batch")
    if any(network not in PEMS for network in options.networks):
        camvid_baselines.import_library()
    experiment = camvid_baselines.compose_experiment(overrides(options, 1, 1.0))
    build_datamodule(experiment).setup("fit")
    now, kept = settings(options), options.output / "settings.json"
    before = stored(kept, lambda: now, f"all results go to {options.output}")
    if differ := [key for key in now if before.get(key) != now[key]]:
        raise UserError(f"{kept} has another {', '.join(differ)}: go on with that, or choose another --output")


def settings(options: argparse.Namespace) -> Results:
    """What results depend on, the recipe included."""
    names = ("images", "trial_images", "batch", "seed", "workers", "overrides")
    recipe = camvid_baselines.compose_experiment(overrides(options, 1, 1.0)).recipe
    given = {name: getattr(options, name) for name in names}
    return {**given, "threads": torch.get_num_threads(), "recipe": OmegaConf.to_container(recipe, resolve=True)}


def overrides(options: argparse.Namespace, steps: int, lr: float, split: str = "val") -> tuple[str, ...]:
    """The experiment of a training, for every network."""
    return (
        "dataset=camvid",
        f"dataset.root={options.root.absolute()}",
        f"dataset.eval_split={split}",
        f"dataset.num_workers={options.workers}",
        "trainer=cpu",
        f"seed={options.seed}",
        f"recipe.global_batch_size={options.batch}",
        f"recipe.max_steps={steps}",
        f"recipe.val_interval={steps}",
        f"recipe.checkpoint_interval={SAVED_STEPS}",
        f"recipe.optimizer.lr={lr}",
        *options.overrides,
    )


def plan(options: argparse.Namespace, network: str, lr: float, images: int, kind: str) -> Run:
    """A training with its folder."""
    folder = options.output.absolute() / f"{kind}_{network}_{lr:g}"
    steps = images // options.batch
    chosen = (*overrides(options, steps, lr), *PEMS.get(network, ()))
    return Run(network, lr, steps * options.batch, folder, chosen)


def stored(path: Path, compute: Callable[[], Results], title: str) -> Results:
    """What a file has from before, or else is computed and written."""
    if not path.is_file():
        common.say(title)
        write_file(path, json.dumps(compute(), indent=2) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def train(one: Run, options: argparse.Namespace) -> Results:
    """Train and validate in another process, from where it was interrupted; returns mIoU, IoU by class and minutes."""
    if one.network not in PEMS:
        return run_baseline("train", one, one.overrides)
    log = ("logger=csv", f"trainer.log_every_n_steps={min(one.images // options.batch, 10)}")
    pictures = (*NO_PICTURES, "callbacks.curves=null", "callbacks.best=null")
    run_script("train.py", *one.overrides, f"hydra.run.dir={one.folder}", "resume=auto", *log, *pictures)
    return {**read_metrics(one.folder), "minutes": one.images * seconds_per_image(one.folder) / 60}


def test(one: Run, options: argparse.Namespace) -> Results:
    """Evaluate a trained network on the test frames, in another process; returns mIoU and IoU by class."""
    chosen = overrides(options, one.images // options.batch, one.lr, split="test")
    if one.network not in PEMS:
        return run_baseline("test", one, chosen)
    folder, checkpoint = one.folder / "test", one.folder / "checkpoints" / "last.ckpt"
    place = (f"checkpoint={checkpoint}", f"hydra.run.dir={folder}", "trainer=cpu")
    data = (override for override in chosen if override.startswith("dataset"))
    run_script("evaluate.py", *place, *data, *NO_PICTURES, "callbacks.worst=null")
    return read_metrics(folder)


def run_baseline(job: str, one: Run, chosen: tuple[str, ...]) -> Results:
    """Train or test a baseline; returns what it writes."""
    threads = str(torch.get_num_threads())
    run_script("scripts/benchmark/camvid_baselines.py", job, one.network, str(one.folder), threads, *chosen)
    return json.loads((one.folder / f"{job}.json").read_text(encoding="utf-8"))


def run_script(script: str, *arguments: str) -> None:
    """Run a script of the project in another process, and show what it prints.

    Interrupted, it waits until the script has saved.

    Raises:
        UserError: the script fails.
    """
    line = [sys.executable, "-c", START, str(ROOT / script), *arguments]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": paths}
    with subprocess.Popen(line, stdout=sys.stderr, env=environment) as child:
        try:
            code = child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
    if code:
        raise UserError(f"{script} has failed (exit code {code}), see above: the same command goes on from there")


def read_metrics(folder: Path) -> Results:
    """mIoU and IoU by class, in percent, of a run of train.py or evaluate.py."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return {"miou": metrics["val/mIoU"], "iou": {row["class"]: row["IoU"] for row in metrics["per_class"]}}


def seconds_per_image(folder: Path) -> float:
    """Of the steps of a run of train.py, from all its logs: it may have been interrupted."""
    speeds = []
    for path in (folder / "csv").glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            speeds += [row.get("train/images_per_second") for row in csv.DictReader(file)]
    return float(np.mean([1 / float(speed) for speed in speeds if speed]))


def measure(runs: list[Run], options: argparse.Namespace) -> tuple[list[int], dict[str, Results]]:
    """Parameters, GMACs and milliseconds of the trained networks, in turns, on the first validation frame.

    From the normalised frame to the map of classes; as they are, and by the fast path (fused, in channels-last).
    """
    data = build_datamodule(camvid_baselines.compose_experiment(runs[0].overrides))
    image = normalize(data.val_dataset[0].image)[None]
    size = list(image.shape[2:])
    names = [one.folder.name for one in runs]
    path = options.output / "latency.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if (before["names"], before["rounds"]) == (names, options.rounds):
            return size, before["measured"]
    tasks: dict[str, Callable[[Lap], object]] = {}
    measured: dict[str, Results] = {}
    for one in runs:
        common.say(f"loading {one.network}")
        network, to_map = load(one)
        counts = {"parameters": count_parameters(network), "gmacs": count_gmacs(network, size[0], size[1])}
        measured[one.network] = counts
        fast = image.contiguous(memory_format=torch.channels_last)
        tasks[f"{one.network} {PATHS[0]}"] = partial(segment, network, to_map, image)
        tasks[f"{one.network} {PATHS[1]}"] = partial(segment, fuse(network), to_map, fast)
    times = common.time_in_turns(tasks, options.rounds, options.warmup)
    for one in runs:
        milliseconds = {kind: [1000 * s for s in times[f"{one.network} {kind}"][TOTAL]] for kind in PATHS}
        measured[one.network]["milliseconds"] = milliseconds
    write_file(path, json.dumps({"names": names, "rounds": options.rounds, "measured": measured}, indent=2) + "\n")
    return size, measured


def fuse(network: nn.Module) -> nn.Module:
    """What `OptimizedNetwork` runs in float32; of a baseline, timm's normalisations are fused, too."""
    if isinstance(network, camvid_baselines.EncoderDecoder):
        network = camvid_baselines.fuse_encoder(network)
    return fuse_batch_norms(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.no_grad()
def segment(network: nn.Module, to_map: Callable[[Any, Any], object], image: torch.Tensor, lap: Lap) -> None:
    """What is timed."""
    output = network(image)
    lap("network")
    to_map(output, image.shape[2:])
    lap("map")


def load(one: Run) -> tuple[nn.Module, Callable[[Any, Any], object]]:
    """A trained network, and what makes a map of classes of its output."""
    if one.network not in PEMS:
        return camvid_baselines.load_trained(one.network, one.folder, one.overrides), camvid_baselines.class_map
    checkpoint = read_checkpoint(one.folder / "checkpoints" / "last.ckpt")
    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    inference = TaskInference("semantic", frozenset(), **checkpoint.config["task"]["inference"])

    def to_map(predictions: Predictions, size: Any) -> object:
        return inference(predictions, tuple(size), tuple(size)).semantic

    return network.eval(), to_map


def report(content: Results, options: argparse.Namespace) -> str:
    """The tables."""
    networks, (height, width) = content["networks"], content["size"]
    rows = []
    for name, one in networks.items():
        rows.append(
            (
                name,
                f"{one['lr']:g}",
                f"{one['images']}",
                f"{one['minutes']:.0f}",
                percent(one["miou"]),
                percent(one["test"]["miou"]) if "test" in one else "",
                f"{one['parameters'] / 1e6:.2f}",
                f"{one['gmacs']:.2f}",
                *(quartiles(one["milliseconds"][kind]) for kind in PATHS),
            )
        )
    columns = ("", "learning rate", "images seen", "minutes", "mIoU val", "mIoU test", "parameters, M", "GMACs")
    facts = f"CamVid, EfficientNet-Lite0, {content['batch']} crops a step, GMACs and time at {height}x{width}"
    parts = [common.describe(facts, options), common.table((*columns, *(f"{kind}, ms" for kind in PATHS)), rows)]
    if rates := sorted({lr for one in networks.values() for lr in one["trials"]}):
        tried = [(name, *(percent(one["trials"].get(lr)) for lr in rates)) for name, one in networks.items()]
        header = f"mIoU val after {content['trial_images']} images, by learning rate"
        parts.append(common.table((header, *(f"{lr:g}" for lr in rates)), tried))
    tested = {name: one["test"] for name, one in networks.items() if "test" in one}
    for split, results in (("val", networks), ("test", tested)):
        cells = [(name, *(percent(one["iou"][c]) for c in CAMVID.class_names)) for name, one in results.items()]
        parts += [common.table((f"IoU {split}", *CAMVID.class_names), cells)] if cells else []
    return "\n\n".join(parts) + "\n"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def draw(networks: Mapping[str, Results]) -> bytes:
    """Quality against latency; returns a PNG."""
    split = "test" if all("test" in one for one in networks.values()) else "val"
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    quality = {name: (one["test"] if split == "test" else one)["miou"] for name, one in networks.items()}
    times = [[float(np.median(one["milliseconds"][kind])) for one in networks.values()] for kind in PATHS]
    axes.hlines(list(quality.values()), times[0], times[1], colors="lightgrey", zorder=0)
    for kind, marker, x in zip(PATHS, "os", times, strict=True):
        axes.scatter(x, list(quality.values()), marker=marker, label=kind)
    for (name, y), fast in zip(quality.items(), times[1], strict=True):
        axes.annotate(name, (fast, y), xytext=(0, 6), textcoords="offset points", fontsize=8, ha="center")
    axes.margins(0.12)
    axes.set_xlabel("milliseconds of a frame, medians")
    axes.set_ylabel(f"mIoU, {'test' if split == 'test' else 'validation'} frames")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()
