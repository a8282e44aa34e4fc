"""What variants cost: parameters, operations, and latency by the benchmark's own clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from pem_lightning.ablation.runs import Run
from pem_lightning.ablation.table import Table, Variant
from pem_lightning.benchmark.contestants import Fast
from pem_lightning.benchmark.lineup import set_threads
from pem_lightning.benchmark.settings import Settings, describe_environment, load_images
from pem_lightning.benchmark.timing import Spread, Task, measure_interleaved
from pem_lightning.benchmark.weights import CITYSCAPES_CLASSES, Weights, imitate_training
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.cli.errors import user_error_behind
from pem_lightning.files import write_file
from pem_lightning.models.flops import count_gmacs, count_parameters
from pem_lightning.models.pem import PEM, build_pem
from pem_lightning.types import UserError

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measurement:
    """What a network costs.

    Attributes:
        parameters_m: millions of trainable numbers.
        gmacs: giga multiply-accumulates per image.
        latency_ms: over the rounds, if it was measured.
        note: why something is missing.
    """

    parameters_m: float | None = None
    gmacs: float | None = None
    latency_ms: Spread | None = None
    note: str = ""


@dataclass(frozen=True)
class Costs:
    """Measurements and how they were taken.

    Attributes:
        measurements: by `network_key`.
        conditions: size, rounds and the machine; empty if nothing was measured.
    """

    measurements: dict[str, Measurement] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)

    def of(self, variant: Variant) -> Measurement:
        """A variant's measurement; empty if there is none."""
        return self.measurements.get(network_key(variant), Measurement())

    def save(self, path: Path) -> None:
        """Write as JSON."""
        networks = {key: asdict(m) for key, m in self.measurements.items()}
        write_file(path, json.dumps({"conditions": self.conditions, "networks": networks}, indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            content = json.loads(path.read_text())
            networks = {
                key: Measurement(**{**m, "latency_ms": m["latency_ms"] and Spread(*m["latency_ms"])})
                for key, m in content["networks"].items()
            }
            return cls(networks, content["conditions"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {path}: measure anew, without --reuse") from error


def network_key(variant: Variant) -> str:
    """Data set, which decides about the classes, and arguments of the network, as JSON."""
    run = variant.runs[0]
    return json.dumps([run.dataset, run.config["network"]], sort_keys=True, default=str)


def measure_variants(
    tables: Iterable[Table], settings: Settings, *, latency: bool = True, say: Say = lambda line: None
) -> Costs:
    """Measure every network of some tables once; latencies in turn, in one process.

    Weights are random: what a variant costs is a matter of its architecture, not of how long it was trained.
    Latency is that of the optimised network alone, because variants share the post-processing.

    Args:
        tables: of `tabulate`.
        settings: size, device, threads, rounds and warm-up are looked at.
        latency: whether to measure it.
        say: is told what happens.
    """
    set_threads(settings.threads)
    variants = {network_key(v): v for table in tables for v in table.variants}
    classes = _classes([run for v in variants.values() for run in v.runs])
    costs: dict[str, Measurement] = {}
    contestants: dict[str, Fast] = {}
    images = load_images(settings)
    for key, variant in variants.items():
        say(f"building {variant.name}")
        try:
            costs[key], contestant = _build(variant, classes[variant.runs[0].dataset], settings)
            if latency:
                contestant.predict(images)
                contestants[key] = contestant
        except Exception as error:  # whatever a backbone's library or the device raises
            reason = user_error_behind(error) or f"{type(error).__name__}: {error}"
            costs[key] = Measurement(note=" ".join(reason.split()))
            say(f"cannot measure {variant.name}: {costs[key].note}")

    def task(contestant: Fast) -> Task:
        return lambda clock: contestant.predict(images)

    tasks = {key: task(contestant) for key, contestant in contestants.items()}
    if tasks:
        timings = measure_interleaved(
            tasks, rounds=settings.rounds, warmup=settings.warmup, device=images.device, progress=say
        )
        for key, timing in timings.items():
            spread = Spread.of([1000 * seconds for seconds in timing.total])
            costs[key] = Measurement(costs[key].parameters_m, costs[key].gmacs, spread)
    return Costs(costs, _conditions(settings, latency))


def reuse_costs(path: Path, tables: Iterable[Table], settings: Settings, *, latency: bool = True) -> Costs | None:
    """Read saved measurements, if they cover all variants and were taken under the same conditions; else None."""
    if not path.is_file():
        return None
    set_threads(settings.threads)
    saved = Costs.load(path)
    wanted = {network_key(variant) for table in tables for variant in table.variants}
    return saved if wanted <= set(saved.measurements) and saved.conditions == _conditions(settings, latency) else None


def _build(variant: Variant, num_classes: int, settings: Settings) -> tuple[Measurement, Fast]:
    network = dict(variant.runs[0].config["network"])
    if network.pop("_target_", None) != "pem_lightning.build_pem":
        # Instantiating whatever a folder's config names would run foreign code.
        raise UserError("its network is of its own kind: only those of build_pem are measured")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # As the field counts: with every layer's masks in full.
        counted = _network(network, num_classes, "always")
        gmacs, parameters = count_gmacs(counted, *settings.size), count_parameters(counted) / 1e6
        timed = imitate_training(_network(network, num_classes, "never"))
    weights = Weights(variant.runs[0].backbone, timed).to(settings.torch_device)
    return Measurement(parameters, gmacs), Fast(weights)


def _network(arguments: Mapping[str, Any], num_classes: int, auxiliary: str) -> PEM:
    backbone = arguments["backbone"]
    if isinstance(backbone, Mapping):
        if not str(backbone.get("_target_")).startswith("pem_lightning.models.backbones."):
            raise UserError("its backbone is of its own kind: only those of networks.backbones are measured")
        backbone = instantiate(backbone, _recursive_=False)
    return build_pem(**{**arguments, "auxiliary": auxiliary, "backbone": backbone}, num_classes=num_classes)


def _classes(runs: Sequence[Run]) -> dict[str, int]:
    """Data set -> how many classes it has, as far as its runs tell; else as many as Cityscapes."""
    found: dict[str, int] = {}
    for read in (_classes_in_metrics, _classes_in_checkpoint):
        for run in runs:
            if run.dataset not in found and (number := read(run)):
                found[run.dataset] = number
    return {run.dataset: found.get(run.dataset, CITYSCAPES_CLASSES) for run in runs}


def _classes_in_metrics(run: Run) -> int | None:
    path = run.path / "metrics.json"
    if run.task == "instance" or not path.is_file():  # instances are reported for things only
        return None
    return len(json.loads(path.read_text()).get("per_class", []))


def _classes_in_checkpoint(run: Run) -> int | None:
    path = run.path / "checkpoints" / "last.ckpt"
    try:
        return read_checkpoint(path).info.num_classes if path.is_file() else None
    except UserError:  # half written: the run may go on
        return None


def _conditions(settings: Settings, latency: bool) -> dict[str, Any]:
    machine = describe_environment(settings.torch_device, "")
    return {
        "size": list(settings.size),
        "latency": latency,
        "rounds": settings.rounds,
        "warmup": settings.warmup,
        **{name: machine[name] for name in ("device", "threads", "cores", "torch")},
    }
