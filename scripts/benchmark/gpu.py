"""What `scripts/gpu_check.py` measures, a part in a process of its own; on a CPU what can run there.

    python -m scripts.benchmark.gpu kernels|inference|step|compile [--small]

Prints a line of JSON as soon as something is known: a row of a table, or text that says what was left out. Exit code 0:
done, and within the limits that are stated here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pem_lightning.types import Predictions
from scripts.benchmark import common, kernels, training
from scripts.benchmark.common import TOTAL, Lap, Times
from scripts.benchmark.inference import PEMPipeline, load_images, segment
from scripts.benchmark.training import PRECISIONS, STAGES, Step

Row = dict[str, Any]
BACKBONE = "stdc1"
DEVIATION, POINTS_DEVIATION = 1e-4, 1e-2
"""Relative, of the kernels from float64; see `kernels.deviations`. On a CPU 6e-6 and 1e-3."""
LOSS_DEVIATION = {"bfloat16": 0.02, "float16": 0.01}
"""Relative, of a step's loss from that in float32. On a CPU, 2 x 128x256: 0.0012 and 0.00003."""
HOST_WAITS = 1
"""Synchronisations of a training step: the matching needs its costs on the host."""
COMPILED = ("bfloat16", "float32", "float16")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--small", action="store_true", help="small images, few rounds: whether it runs at all")
    parser.add_argument("--seconds", type=float, default=100.0, help="after which nothing further is compiled")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    failures = 0
    for line in PARTS[options.part](options):
        print(json.dumps(line), flush=True)
        failures += isinstance(line, str) and line.startswith("failed")
    return int(failures > 0)


def check_kernels(options: argparse.Namespace) -> Iterator[Row | str]:
    """Every kernel of the deformable operators against float64, and its time."""
    torch.backends.cudnn.allow_tf32 = False  # the definition of the convolution would run in TF32
    size = argparse.Namespace(
        size=(64, 128) if options.small else (1024, 2048), batch=1, rounds=1, device=options.device
    )
    for operator, kernel, deviation, points, forward, both in kernels.measure_all(size):
        row = {
            "operator": operator,
            "kernel": kernel,
            "off float64": float(f"{deviation:.2g}"),
            "gradients of points": float(f"{points:.2g}"),
        }
        yield {**row, "forward, ms (IQR)": forward, "with backward, ms (IQR)": both}
        if not (deviation <= DEVIATION and points <= POINTS_DEVIATION):  # NaN is no equality
            yield f"failed: {operator}, {kernel}: off float64 by more than {DEVIATION} or {POINTS_DEVIATION} (points)"


def measure_inference(options: argparse.Namespace) -> Iterator[Row | str]:
    """Whole images by precision, as they are and as CUDA graphs, beside the time that the card needs at least."""
    cuda, images = options.device == "cuda", load_images(image_options(options))
    ceilings = measure_ceilings(options)
    rates = {name if name == "copy" else f"{name} product": f"{value / 1e9:.4g}" for name, value in ceilings.items()}
    yield {"GB/s and GFLOP/s": "reached", **rates}
    precisions = PRECISIONS if cuda else PRECISIONS[:2]
    pipelines = {name: PEMPipeline(BACKBONE, name, image_options(options)) for name in precisions}
    floors = {name: Floor(pipeline, name, images, ceilings) for name, pipeline in pipelines.items()}
    memory = {name: added_memory(partial(segment, p, images)) if cuda else {} for name, p in pipelines.items()}
    tasks = {name: partial(segment, p, images) for name, p in pipelines.items()}
    times = common.time_in_turns(tasks, rounds(options), 2, options.device)
    with torch.no_grad():
        expected = pipelines["float32"].predict(images).mask_logits.clone()
        for name, pipeline in pipelines.items():
            found = pipeline.predict(images).mask_logits
            yield inference_row(name, times[name], floors[name], off(found, expected), memory[name])
    yield "At least: GFLOP by the rate of the product (float32: TF32, as convolutions run), or MB by that of the copy."
    if not cuda:
        yield "left out: float16, CUDA graphs: they need CUDA"
        return
    replays = {name: Replay(pipeline, images) for name, pipeline in pipelines.items()}
    times = common.time_in_turns(dict(replays), rounds(options), 2, options.device)
    for name, replay in replays.items():
        deviation = off(replay.output.mask_logits, pipelines[name].predict(images).mask_logits)
        yield inference_row(f"{name}, CUDA graph", times[name], floors[name], deviation)
        if not deviation < 0.05:  # rounding, of another choice among cuDNN's algorithms
            yield f"failed: the CUDA graph of {name} gives other masks than the network"


def measure_compiled(options: argparse.Namespace) -> Iterator[Row | str]:
    """Whole images with `inference.compile=reduce-overhead`: kernels fused by torch.compile, in CUDA graphs."""
    images, ceilings = load_images(image_options(options)), measure_ceilings(options)
    began, longest = time.monotonic(), 0.0
    for name in COMPILED:
        if time.monotonic() - began + 1.2 * longest > options.seconds:
            yield f"left out: {name}: a compilation takes up to {longest:.0f} s"
            continue
        start = time.monotonic()
        plain = PEMPipeline(BACKBONE, name, image_options(options))
        pipeline = PEMPipeline(BACKBONE, name, image_options(options, compile="reduce-overhead"))
        for _ in range(3):  # compiled, recorded, replayed
            segment(pipeline, images)
        torch.cuda.synchronize()
        longest = max(longest, time.monotonic() - start)
        tasks = {name: partial(segment, pipeline, images)}
        times = common.time_in_turns(tasks, rounds(options), 2, options.device)[name]
        deviation = off(pipeline.predict(images).mask_logits, plain.predict(images).mask_logits)
        row = inference_row(f"{name}, compiled", times, Floor(plain, name, images, ceilings), deviation)
        yield {**row, "to compile, s": round(longest, 1)}


def measure_step(options: argparse.Namespace) -> Iterator[Row | str]:
    """A training step by precision: its loss beside float32's, how often the host waits, time and memory."""
    cuda = options.device == "cuda"
    shape: Row = {"size": (64, 128), "batch": 2, "segments": 4, "num_points": 256}
    if not options.small:
        shape = {"size": (512, 1024), "batch": 8, "segments": 15, "num_points": 12544}
    settings = argparse.Namespace(**shape, device=options.device)
    batch = training.draw_batch(settings)
    steps, losses = {}, {}
    waits: dict[str, list[str]] = {}
    memory: dict[str, Row] = {}
    for name in PRECISIONS if cuda else PRECISIONS[:2]:
        steps[name] = step = Step(BACKBONE, name, "ours", settings)
        torch.manual_seed(0)  # the same points in all precisions
        losses[name] = float(step.forward(batch)[1].detach())
        waits[name], memory[name] = [], {}
        if cuda:
            step.run(batch)  # brings constants to the device, and makes the optimiser's state
            waits[name] = host_waits(partial(step.run, batch))
            memory[name] = added_memory(partial(step.run, batch))
    tasks = {name: partial(step.run, batch) for name, step in steps.items()}
    times = common.time_in_turns(tasks, rounds(options), int(cuda), options.device)
    for name, found in times.items():
        deviation = abs(losses[name] / losses["float32"] - 1)
        row: Row = {"step": name, "ms": milliseconds(found[TOTAL])}
        row |= {stage: milliseconds(found[stage]) for stage in STAGES}
        row |= {"loss": round(losses[name], 3), "off float32": float(f"{deviation:.2g}")}
        yield {**row, **({"host waits": len(waits[name])} if cuda else {}), **memory[name]}
        if not deviation <= LOSS_DEVIATION.get(name, 0.0):
            yield f"failed: the loss of {name} is off float32's by more than {LOSS_DEVIATION[name]:.0%}"
        if len(waits[name]) > HOST_WAITS:
            yield f"failed: {name}: the host waits {len(waits[name])} times: " + "; ".join(waits[name])
    if not cuda:
        yield "left out: float16, host waits, memory: they need CUDA"


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row | str]]] = {
    "kernels": check_kernels,
    "inference": measure_inference,
    "step": measure_step,
    "compile": measure_compiled,
}


def rounds(options: argparse.Namespace) -> int:
    return 1 if options.small else 10


def image_options(options: argparse.Namespace, compile: str | None = None) -> argparse.Namespace:
    size = (64, 128) if options.small else (1024, 2048)
    return argparse.Namespace(size=size, batch=1, device=options.device, checkpoint=None, image=None, compile=compile)


def inference_row(name: str, times: Times, floor: Floor, deviation: float, memory: Row | None = None) -> Row:
    network = milliseconds(times["network"])
    row: Row = {"network": name, "ms": network, "with results, ms": milliseconds(times[TOTAL])}
    row |= {"GFLOP": round(floor.operations / 1e9, 1), "MB moved": round(floor.bytes / 1e6, 1)}
    row |= {"at least, ms": round(floor.milliseconds, 3), "share": round(floor.milliseconds / network, 3)}
    return {**row, "masks off by": deviation, **(memory or {})}


class Floor:
    """The time that an image needs at least, on a machine that reaches its ceilings.

    Operations are counted by `models.flops`. Bytes are those of all operators' inputs and outputs, each read or written
    once, as PyTorch runs them one by one; fused kernels move fewer.
    """

    def __init__(self, pipeline: PEMPipeline, precision: str, images: Tensor, ceilings: dict[str, float]) -> None:
        self.operations = 2e9 * pipeline.gmacs(images) * len(images)
        with torch.no_grad(), CountBytes() as counter:
            pipeline.predict(images)
        self.bytes = counter.total
        # PyTorch's float32 convolutions run in TF32 by default.
        product = ceilings["TF32" if precision == "float32" and "TF32" in ceilings else precision]
        self.milliseconds = 1000 * max(self.operations / product, self.bytes / ceilings["copy"])


class CountBytes(TorchDispatchMode):
    """Adds up the bytes that operators read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if inputs and not func.is_view:
            tensors = [*inputs, *(t for t in tree_leaves(out) if isinstance(t, Tensor))]
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)  # expanded ones are small
        return out


def measure_ceilings(options: argparse.Namespace) -> dict[str, float]:
    """Bytes per second of a large copy, read plus written, and operations per second of large products of noise."""
    side, count = (512, 2**20) if options.small else (8192, 2**28)
    source = torch.zeros(count, device=options.device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / fastest(lambda: target.copy_(source), options.device)}
    for name in ("float32", "TF32", "bfloat16", "float16") if options.device == "cuda" else PRECISIONS[:2]:
        dtype = torch.float32 if name == "TF32" else getattr(torch, name)
        a, b = (torch.randn(side, side, device=options.device, dtype=dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = name == "TF32"
        found[name] = 2 * side**3 / fastest(partial(torch.matmul, a, b), options.device)
        torch.backends.cuda.matmul.allow_tf32 = False
    return found


def fastest(work: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of eight runs."""
    return min(common.time_once(lambda _: work(), device)[TOTAL] for _ in range(8))


class Replay:
    """A network's kernels for some images, recorded once as a CUDA graph, then post-processing: a task to be timed."""

    def __init__(self, pipeline: PEMPipeline, images: Tensor) -> None:
        self.pipeline, self.size = pipeline, (images.shape[2], images.shape[3])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():  # what is made at the first call must not be recorded
            for _ in range(3):
                pipeline.predict(images)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.output: Predictions = pipeline.predict(images)

    @torch.no_grad()
    def __call__(self, lap: Lap) -> None:
        """Replay."""
        self.graph.replay()
        lap("network")
        self.pipeline.postprocess(self.output, self.size)
        lap("results")


def host_waits(work: Callable[[], object]) -> list[str]:
    """Messages of PyTorch about every call with which the host waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(one.message) for one in caught if "called a synchronizing" in str(one.message)]


def added_memory(work: Callable[[], object]) -> Row:
    """The most MiB of a GPU that some work takes beside what lies there already."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return {"added MiB": round((torch.cuda.max_memory_allocated() - before) / 2**20)}


def milliseconds(seconds: Sequence[float]) -> float:
    return float(f"{1000 * np.median(seconds):.4g}")


def off(actual: Tensor, expected: Tensor) -> float:
    """Relative deviation, of norms."""
    return float(f"{(actual.double() - expected.double()).norm() / expected.double().norm():.2g}")


if __name__ == "__main__":
    sys.exit(main())
