"""What a trained network gains and loses with fewer decoder layers, fewer queries, coarser masks and int8.

Quality is that of evaluate.py on the validation images, latency that of one image up to the logits, in turns, every
measurement in a process of its own. A variant is a checkpoint, which all programs take unchanged. What a folder has
already is read back: start the command again to go on, and with --retime to measure latency anew.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from torch import Tensor, nn

from pem_lightning import build_pem
from pem_lightning.checkpoints import CHECKPOINT_KEY, Checkpoint, load_network, read_checkpoint, refuse_exported
from pem_lightning.cli.build import calibration_images
from pem_lightning.cli.errors import compose
from pem_lightning.cli.overrides import quote, take_over
from pem_lightning.files import write_file
from pem_lightning.inference.optimize import OptimizedNetwork, shorten
from pem_lightning.models.flops import count_gmacs
from pem_lightning.models.pem import PEM
from pem_lightning.models.pixel_decoder import LevelSum
from pem_lightning.preprocess import normalize
from pem_lightning.types import Predictions, UserError
from scripts.benchmark import common
from scripts.benchmark.runtimes import ROOT, measure

RANKING_IMAGES = 64  # of the training set, evenly spread
ALLOWED_LOSS = 0.5  # percent; what a combination's parts may lose
Runtime = tuple[str, str]
PYTORCH, OPENVINO, INT8 = ("PyTorch", "float32"), ("OpenVINO", "float32"), ("OpenVINO", "int8")


class Variant(NamedTuple):
    """A network in a runtime. The options are those of `build`, None as trained."""

    checkpoint: Path
    decoder_layers: int | None = None
    num_queries: int | None = None
    mask_stride: int = 4
    runtime: Runtime = PYTORCH

    @property
    def name(self) -> str:
        """For people; unique."""
        changes = [
            *([f"{self.decoder_layers} layers"] if self.decoder_layers is not None else []),
            *([f"{self.num_queries} queries"] if self.num_queries is not None else []),
            *([f"masks at stride {self.mask_stride}"] if self.mask_stride != 4 else []),
        ]
        runtime = "" if self.runtime == PYTORCH else f", {' '.join(self.runtime)}"
        return f"{self.checkpoint.stem}: {', '.join(changes) or 'as trained'}{runtime}"

    @property
    def file(self) -> str:
        """What the network's file is called."""
        return "".join(c if c.isalnum() else "_" for c in self.name) + (".ckpt" if self.runtime == PYTORCH else ".xml")


class CoarseMasks(PEM):
    """A PEM that computes mask features and masks at stride 8, and resizes the masks to the usual stride 4."""

    def __init__(self, network: PEM) -> None:
        super().__init__(network.backbone, network.pixel_decoder, network.transformer_decoder)
        pooled = nn.Sequential(nn.AvgPool2d(2), self.pixel_decoder.mask_projection)
        self.pixel_decoder.mask_projection = pooled  # type: ignore[assignment]

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Predictions:
        """As `PEM.forward`."""
        out = super().forward(images)
        masks = F.interpolate(out.mask_logits, scale_factor=2.0, mode="bilinear", align_corners=False)
        return Predictions(out.class_logits, masks)


def build(*, decoder_layers: int | None = None, mask_stride: int = 4, **arguments: Any) -> PEM:
    """`build_pem` for the checkpoints of variants, which name this function."""
    network: Any = shorten(build_pem(**arguments), decoder_layers)
    return CoarseMasks(network) if mask_stride == 8 else network


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", nargs="+", type=Path, required=True, help="the first in all variants, others as trained"
    )
    parser.add_argument("--root", type=Path, required=True, help="of the data set that they were trained on")
    parser.add_argument("--queries", nargs="*", type=common.positive, default=[20, 11], help="to keep")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=common.parse_size,
        default=[(360, 480), (1024, 2048)],
        help="HEIGHTxWIDTH, for latency",
    )
    parser.add_argument("--int8", action=argparse.BooleanOptionalAction, default=True, help="OpenVINO's")
    parser.add_argument("--retime", action="store_true", help="measure latency anew")


def run(options: argparse.Namespace) -> tuple[str, dict[str, common.Times]]:
    """Measure what is missing in the folder; writes efficiency.json and efficiency.png, and returns a report.

    Raises:
        UserError: there is no folder, a checkpoint cannot be used, or a program fails.
    """
    if options.output is None:
        raise UserError("efficiency needs a folder for its networks and numbers: say --output FOLDER")
    options.device = "cpu"
    study = Study(options)
    first = study.checkpoints[0]
    decoder = first.network.transformer_decoder
    layers, trained_queries = len(decoder.layers), decoder.query_features.num_embeddings
    queries = sorted({count for count in options.queries if count < trained_queries}, reverse=True)
    whole = Variant(first.path)
    early = [Variant(first.path, decoder_layers=count) for count in range(layers - 1, -1, -1)]
    fewer = [Variant(first.path, num_queries=count) for count in queries]
    pyramid = not isinstance(first.network.pixel_decoder.mask_projection, LevelSum)
    coarse = [Variant(first.path, mask_stride=8)] if pyramid else []
    others = [Variant(one.path) for one in study.checkpoints[1:]]
    variants = [whole, *early, *fewer, *coarse, *others]
    for variant in variants:
        study.find_quality(variant)
    variants += combine(study, whole, early, fewer, options.int8)
    for variant in variants:
        study.find_quality(variant)
    study.find_latencies(variants)
    write_file(study.folder / "efficiency.png", draw(study, whole, early, variants))
    return report(study, whole, variants), {}


def combine(
    study: Study, whole: Variant, early: Sequence[Variant], fewer: Sequence[Variant], int8: bool
) -> list[Variant]:
    """What is cheapest of each kind and loses at most `ALLOWED_LOSS`, together; and in int8."""

    def cheapest(found: Sequence[Variant]) -> Variant:
        good = [one for one in found if study.quality(one) >= study.quality(whole) - ALLOWED_LOSS]
        return good[-1] if good else whole

    layers, queries = cheapest(early), cheapest(fewer)
    both = whole._replace(decoder_layers=layers.decoder_layers, num_queries=queries.num_queries)
    found = [] if both in (layers, queries, whole) else [both]
    if int8:
        bases = dict.fromkeys((whole, layers, both))
        found += [base._replace(runtime=runtime) for runtime in (OPENVINO, INT8) for base in bases]
    return found


class Trained(NamedTuple):
    """A checkpoint, its network and its file's hash."""

    path: Path
    checkpoint: Checkpoint
    network: Any  # PEM
    sha256: str


class Study:
    """The folder: networks, and efficiency.json with what was measured of each."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder, self.root = options, options.output.resolve(), options.root.resolve()
        self.checkpoints = [load(path.resolve()) for path in options.checkpoint]
        if len({one.path.stem for one in self.checkpoints}) < len(self.checkpoints):
            raise UserError("--checkpoint: files of the same name cannot be told apart, rename one")
        self.path = self.folder / "efficiency.json"
        try:
            self.rows: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        except ValueError as error:
            raise UserError(f"{self.path} cannot be read ({error}): remove it to begin anew") from error
        hashes = {one.path.stem: one.sha256 for one in self.checkpoints}
        # Rows of files that have changed since are of no use.
        self.rows = {k: r for k, r in self.rows.items() if hashes.get(k.partition(": ")[0]) in (None, r["sha256"])}
        if options.retime:
            for row in self.rows.values():
                row["milliseconds"] = {}

    def row(self, variant: Variant) -> dict[str, Any]:
        """What is known of a variant; changes are kept by `save`."""
        sha256 = self.trained(variant).sha256
        return self.rows.setdefault(variant.name, {"sha256": sha256, "quality": None, "milliseconds": {}})

    def trained(self, variant: Variant) -> Trained:
        """What a variant is made of."""
        return next(one for one in self.checkpoints if one.path == variant.checkpoint)

    def quality(self, variant: Variant) -> float:
        """Percent."""
        return self.row(variant)["quality"]

    def save(self) -> None:
        """Write efficiency.json."""
        write_file(self.path, json.dumps(self.rows, indent=1))

    def find_quality(self, variant: Variant) -> None:
        """Write the variant's file and measure its quality, unless both are there."""
        path = self.folder / variant.file
        if self.row(variant)["quality"] is not None and path.is_file():
            return
        monitor = self.trained(variant).checkpoint.config["task"]["monitor"]
        common.say(f"quality of {variant.name}")
        if variant.runtime == PYTORCH:
            self.write_checkpoint(variant, path)
            self.row(variant)["gmacs"] = count_gmacs(load(path).network, *self.options.sizes[0])
        else:
            source = self.folder / variant._replace(runtime=PYTORCH).file
            how = (f"checkpoint={source}", f"output={path}", f"precision={variant.runtime[1]}", "evaluate=false")
            self.command("export", *how, log=self.folder / "export")
        log = self.folder / "evaluation"
        pictures = (f"callbacks.{name}=null" for name in ("panels", "worst", "confusion"))
        self.command("evaluate", f"checkpoint={path}", *pictures, log=log)
        metrics = json.loads((log / "metrics.json").read_text())
        self.row(variant)["quality"] = metrics[monitor]
        self.save()

    def command(self, job: str, *arguments: str, log: Path) -> None:
        """Run one of the project's commands."""
        arguments = (*arguments, f"dataset.root={self.root}", "trainer=cpu", "dataset.num_workers=1")
        line = [sys.executable, str(ROOT / f"{job}.py"), *arguments, f"hydra.run.dir={quote(log)}"]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{job}.py {arguments[0]} has failed: {last.removeprefix('error: ')}")

    def write_checkpoint(self, variant: Variant, path: Path) -> None:
        """Write a variant as train.py writes a checkpoint."""
        trained = self.trained(variant)
        arguments, kept = dict(trained.checkpoint.config["network"]), None
        if variant.num_queries is not None:
            arguments["num_queries"], kept = variant.num_queries, self.ranked(variant)[: variant.num_queries]
        network: Any = shorten(copy.deepcopy(trained.network), variant.decoder_layers, kept)
        network = CoarseMasks(network) if variant.mask_stride == 8 else network
        if (variant.decoder_layers, variant.mask_stride) != (None, 4):
            arguments |= {"_target_": f"{__name__}.build", "decoder_layers": variant.decoder_layers}
            arguments |= {"mask_stride": variant.mask_stride}
        ours = {
            "config": {**trained.checkpoint.config, "network": arguments},
            "overrides": trained.checkpoint.overrides,
            "dataset_info": trained.checkpoint.info.to_dict(),
        }
        state = {f"network.{name}": value for name, value in network.state_dict().items()}
        content = io.BytesIO()
        torch.save({"global_step": trained.checkpoint.step, "state_dict": state, CHECKPOINT_KEY: ours}, content)
        write_file(path, content.getvalue())

    def ranked(self, variant: Variant) -> list[int]:
        """Queries by what they contribute with as many layers, the most useful first; kept in efficiency.json."""
        trained, base = self.trained(variant), Variant(variant.checkpoint, variant.decoder_layers)
        row = self.row(base)
        if "ranking" not in row:
            common.say(f"ranking the queries of {base.name}")
            overrides = [
                f"checkpoint={quote(trained.path)}",
                f"dataset.root={quote(self.root)}",
                "output_dir=unused",
            ]
            cfg = compose("export", take_over("export", overrides)[0])
            network = cast(PEM, shorten(trained.network, variant.decoder_layers))
            row["ranking"] = rank_queries(network, calibration_images(cfg, RANKING_IMAGES)).tolist()
            self.save()
        return row["ranking"]

    def find_latencies(self, variants: Sequence[Variant]) -> None:
        """Time the variants in turns until each has been timed in all rounds."""
        for size in self.options.sizes:
            key = "x".join(map(str, size))
            settings = argparse.Namespace(size=size, warmup=self.options.warmup)
            for turn in range(self.options.rounds):
                common.say(f"{key}, round {turn + 1} of {self.options.rounds}")
                for variant in [*variants[turn % len(variants) :], *variants[: turn % len(variants)]]:
                    times = self.row(variant)["milliseconds"].setdefault(key, [])
                    if len(times) <= turn:
                        seconds = measure(self.folder / variant.file, "float32", settings).seconds
                        times.append(1000 * seconds)
                        self.save()


def load(path: Path) -> Trained:
    """Read a checkpoint."""
    refuse_exported(path)
    checkpoint = read_checkpoint(path)
    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes)
    load_network(network, checkpoint)
    return Trained(path, checkpoint, network.eval(), hashlib.sha256(path.read_bytes()).hexdigest())


@torch.no_grad()
def rank_queries(network: PEM, images: Iterable[np.ndarray]) -> Int64[Tensor, " Q"]:
    """Queries by the class probability times mask probability that they add up to, the largest sum first.

    Every class counts the same, however small: a query's sum is its largest share of what a class has in all.

    Args:
        images: uint8 [1, H, W, 3].
    """
    fast, total = OptimizedNetwork(network), torch.zeros(())
    for image in images:
        out = fast(normalize(torch.from_numpy(image[0]).permute(2, 0, 1))[None])
        area = out.mask_logits[0].sigmoid().mean((1, 2))
        total = total + out.class_logits[0].softmax(-1)[:, :-1] * area[:, None]  # Q K
    return (total / total.sum(0)).amax(1).argsort(descending=True)


def report(study: Study, whole: Variant, variants: Sequence[Variant]) -> str:
    """The table."""
    sizes = ["x".join(map(str, size)) for size in study.options.sizes]
    metric = study.trained(whole).checkpoint.config["task"]["monitor"].removeprefix("val/")
    columns = ["", metric, "change", f"{sizes[0]}, GMACs"]
    for size in sizes:
        columns += [f"{size}, ms", "of as trained"]
    rows = []
    for variant in variants:
        quality = study.quality(variant)
        gmacs = study.row(variant._replace(runtime=PYTORCH))["gmacs"]
        cells = [variant.name, f"{quality:.2f}", f"{quality - study.quality(whole):+.2f}", common.number(gmacs)]
        for size in sizes:
            own, base = (study.row(one)["milliseconds"][size] for one in (variant, whole))
            cells += [common.quartiles(own), f"{np.median(np.divide(own, base)):.2f}"]
        rows.append(cells)
    facts = f"{metric} of the validation images; latency of one image up to the logits"
    notes = []
    for variant in variants:
        if ranking := study.row(variant).get("ranking"):
            numbers = ",".join(map(str, ranking))
            notes.append(f"{variant.name}: queries by what they contribute, the most useful first: [{numbers}]")
    return "\n\n".join([common.describe(facts, study.options), common.table(columns, rows), *notes]) + "\n"


def draw(study: Study, whole: Variant, early: Sequence[Variant], variants: Sequence[Variant]) -> bytes:
    """Quality against latency at the first size; returns a PNG."""
    size = "x".join(map(str, study.options.sizes[0]))

    def place(variant: Variant) -> tuple[float, float]:
        return float(np.median(study.row(variant)["milliseconds"][size])), study.quality(variant)

    figure = Figure(figsize=(8, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*map(place, (whole, *early)), strict=True), "o-", label="early exit, by decoder layers")
    for count, variant in zip(range(len(early), -1, -1), (whole, *early), strict=True):
        axes.annotate(str(count), place(variant), textcoords="offset points", xytext=(0, 6), ha="center")
    for variant in variants:
        if variant not in (whole, *early):
            axes.plot(*place(variant), "s", label=variant.name)
    axes.set_xlabel(f"milliseconds, {size}, {torch.get_num_threads()} threads")
    axes.set_ylabel(f"{study.trained(whole).checkpoint.config['task']['monitor'].removeprefix('val/')}, validation")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    figure.savefig(picture := io.BytesIO(), format="png")
    return picture.getvalue()
