"""Exported networks in their runtimes beside PyTorch, on the CPU: from a uint8 image to the logits, nothing after them.

Every measurement is a process of its own (`runner.py`), which ends before the next one begins.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pem_lightning.checkpoints import CHECKPOINT_KEY, read_checkpoint
from pem_lightning.data import CITYSCAPES
from pem_lightning.deploy.export import ExportOptions, export_checkpoint
from pem_lightning.deploy.quantize import quantize_openvino
from pem_lightning.deploy.sessions import openvino_core
from pem_lightning.models.backbones import BACKBONES
from pem_lightning.types import UserError
from scripts.benchmark import common, training
from scripts.benchmark.baselines import BASELINES, export_baseline
from scripts.benchmark.common import TOTAL, Times, quartiles
from scripts.benchmark.runner import draw_image

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("runner.py")
PYTORCH, ONNX, OPENVINO = "PyTorch", "ONNX Runtime", "OpenVINO"
PACKAGES = {ONNX: ["numpy", "pillow", "onnxruntime"], OPENVINO: ["numpy", "pillow", "openvino"]}
CALIBRATION_IMAGES = 8
BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # of processors
INT8_FLAGS = {"avx512_vnni", "avx_vnni", "asimddp"}


class Runner(NamedTuple):
    """What is timed: a file in a runtime."""

    network: str  # a backbone of PEM, or a baseline
    runtime: str
    precision: str
    file: str

    @property
    def name(self) -> str:
        """For people."""
        return " ".join(self[:3])


class Measurement(NamedTuple):
    """Of one process."""

    seconds: float
    start: float  # seconds from its start to the first result
    memory: float  # peak, MiB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=["stdc1", "resnet50"], help="of PEM")
    parser.add_argument("--baselines", nargs="+", choices=BASELINES, default=[], help="need requirements-bench.txt")
    parser.add_argument("--size", type=common.parse_size, default=(1024, 2048), help="HEIGHTxWIDTH of the image")


def run(options: argparse.Namespace) -> tuple[str, dict[str, Times]]:
    """Export, then time in turns; returns a report and the times. What fails is left out, and the report says why.

    Raises:
        UserError: a runtime is not installed, or nothing is left.
    """
    options.device = "cpu"
    try:
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "openvino"))
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(f"runtimes needs {error.name}: pip install -r requirements-export.txt") from error
    runners, notes = list_runners(options, processor_flags())
    failures: dict[Runner, str] = {}
    with TemporaryDirectory() as scratch:
        for network in (*options.backbones, *options.baselines):
            common.say(f"exporting {network}")
            (folder := Path(scratch) / network).mkdir()
            why = "was not exported"
            try:
                if note := common.in_fresh_process(export, network, options.size, folder):
                    notes.append(f"{network}: {note}.")
            except BrokenProcessPool:
                why = "the process that exports it has died"
            except UserError as problem:
                why = str(problem)
            failures |= {r: why for r in runners if r.network == network and not (folder / r.file).is_file()}
        files = {runner: Path(scratch) / runner.network / runner.file for runner in runners if runner not in failures}
        sizes = {runner: file_size(file) for runner, file in files.items()}
        measured = measure_in_turns(files, options, failures)
    if not measured:
        raise UserError(f"nothing could be measured: {next(iter(failures.values()))}")
    times = {r.name: {"network": [m.seconds for m in found]} for r, found in measured.items()}
    times = {name: {**one, TOTAL: one["network"]} for name, one in times.items()}
    rows = []
    for runner, found in measured.items():
        network = runner.network if runner.network in BACKBONES else options.backbones[0]
        base = times.get(f"{network} {PYTORCH} float32")
        _, start, memory = np.median(found, axis=0)
        rows.append(
            (
                runner.name,
                quartiles(times[runner.name][TOTAL], 1000),
                quartiles(common.ratios(times[runner.name], base)) if base else "",
                f"{memory:.0f}",
                common.number(start),
                f"{sizes[runner]:.1f}",
                f"{install_size(PACKAGES.get(runner.runtime) or requirements()):.0f}",
            )
        )
    facts = f"Network, {options.size[0]}x{options.size[1]}, {versions}"
    columns = ("", "ms", f"of {PYTORCH} float32", "peak MiB", "start to first result, s", "file, MB", "installed, MB")
    if options.baselines:
        notes.append(f"Baselines are compared with {options.backbones[0]} {PYTORCH} float32.")
    notes += [f"{runner.name} is left out: {error}." for runner, error in failures.items()]
    return "\n\n".join([common.describe(facts, options), common.table(columns, rows), *notes]) + "\n", times


def list_runners(options: argparse.Namespace, flags: set[str]) -> tuple[list[Runner], list[str]]:
    """What a processor can time, and notes about what it cannot."""
    precisions, notes = ["float32"], []
    if flags & BFLOAT16_FLAGS:
        precisions.append("bfloat16")
    else:
        notes.append("bfloat16 is left out: this processor has no instructions for it.")
    if not flags & INT8_FLAGS:
        notes.append("This processor has no dot products of int8 (VNNI), which make int8 fast.")
    runners = []
    for network in (*options.backbones, *options.baselines):
        ours = network in BACKBONES
        runners += [Runner(network, PYTORCH, precision, "model.ckpt") for precision in precisions if ours]
        runners.append(Runner(network, ONNX, "float32", "model.onnx"))
        runners += [Runner(network, OPENVINO, precision, "model.xml") for precision in precisions]
        runners += [Runner(network, OPENVINO, "int8", "int8.xml")] if ours else []
    return runners, notes


def processor_flags() -> set[str]:
    """Names of the instruction sets, on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()


def export(network: str, size: tuple[int, int], folder: Path) -> str:
    """Write all files of a network with random weights; returns what a reader has to know about it.

    Raises:
        UserError: it cannot be exported.
    """
    logging.disable(logging.WARNING)  # what tracing and conversion say about every operator
    warnings.simplefilter("ignore")
    try:
        if network in BASELINES:
            return f"logits of {' and '.join(map(str, export_baseline(network, size, folder)))}"
        with redirect_stdout(sys.stderr):  # progress bars of NNCF
            export_backbone(network, size, folder)
        return ""
    except Exception as error:  # whatever tracing and conversion raise; not all of it can be sent to another process
        raise UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}") from error


def export_backbone(backbone: str, size: tuple[int, int], folder: Path) -> None:
    """Write model.ckpt as train.py does, and what export.py makes of it for images of a size."""
    import openvino

    checkpoint = folder / "model.ckpt"
    write_checkpoint(backbone, checkpoint)
    for format, file in (("onnx", "model.onnx"), ("openvino", "model.xml")):
        export_checkpoint(read_checkpoint(checkpoint), folder / file, ExportOptions(format, size=size))
    noise = [draw_image(*size, seed) for seed in range(CALIBRATION_IMAGES)]
    quantized = quantize_openvino(openvino_core().read_model(folder / "model.xml"), noise)
    openvino.save_model(quantized, folder / "int8.xml")


def write_checkpoint(backbone: str, path: Path) -> None:
    """Write the paper's network for Cityscapes with random weights."""
    config = training.paper_config(f"backbone={backbone}", f"output_dir={path.parent}")
    ours = {
        "config": OmegaConf.to_container(config, resolve=True),
        "overrides": [],
        "dataset_info": CITYSCAPES.to_dict(),
    }
    state = {f"network.{name}": value for name, value in common.random_network(backbone).state_dict().items()}
    torch.save({"global_step": 0, "state_dict": state, CHECKPOINT_KEY: ours}, path)


def measure_in_turns(
    files: dict[Runner, Path], options: argparse.Namespace, failures: dict[Runner, str]
) -> dict[Runner, list[Measurement]]:
    """Measure every file once per round; each round starts with the next one. What fails goes to `failures`."""
    measured: dict[Runner, list[Measurement]] = {runner: [] for runner in files}
    for turn in range(options.rounds):
        common.say(f"round {turn + 1} of {options.rounds}")
        runners = list(measured)
        for runner in [*runners[turn % len(files) :], *runners[: turn % len(files)]]:
            try:
                measured[runner].append(measure(files[runner], runner.precision, options))
            except UserError as error:
                failures[runner] = str(error)
                del measured[runner]
                common.say(f"error: {runner.name}: {error}")
    return measured


def measure(file: Path, precision: str, options: argparse.Namespace) -> Measurement:
    """Start a process, and time one run of its network after the first result and the warm-up.

    Raises:
        UserError: the process fails.
    """
    threads = str(torch.get_num_threads())
    size, runs = "x".join(map(str, options.size)), str(options.warmup + 1)
    command = [sys.executable, str(RUNNER), str(file), precision, size, threads, runs]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    began = time.perf_counter()
    with TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as child:
            assert child.stdout is not None
            try:
                child.stdout.readline()
                start = time.perf_counter() - began
                answer = child.stdout.readline()
            except BaseException:
                child.kill()
                raise
        if not answer:
            errors.seek(0)
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            code = child.returncode
            end = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise UserError(f"its process has failed ({end}): {last}")
    seconds, memory = map(float, answer.split())
    return Measurement(seconds, start, memory)


def file_size(file: Path) -> float:
    """MB of a network's file, or files."""
    parts = (file, file.with_suffix(".bin")) if file.suffix == ".xml" else (file,)
    return sum(part.stat().st_size for part in parts) / 1e6


def requirements() -> list[str]:
    """What PyTorch's way needs: requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def install_size(packages: Iterable[str]) -> float:
    """MB of the files of packages and of all that they need."""
    sizes: dict[str, float] = {}
    waiting = [Requirement(line) for line in packages]
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        if name in sizes or (needed.marker and not needed.marker.evaluate({"extra": ""})):
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # an alternative of another package
            continue
        paths = [Path(str(package.locate_file(path))) for path in package.files or ()]
        sizes[name] = sum(path.stat().st_size for path in paths if path.is_file()) / 1e6
        waiting += map(Requirement, package.requires or ())
    return sum(sizes.values())
