"""One network in a process of its own, started by `runtimes`.

    python scripts/benchmark/runner.py FILE PRECISION HEIGHTxWIDTH THREADS RUNS

FILE is a checkpoint (.ckpt), which PyTorch runs, or a network that was exported to .onnx or .xml. The first line of the
output ends with the first result; the second one is the seconds of the last of RUNS further ones, and the peak memory
in MiB. Nothing is imported that the runtime does not need.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Run = Callable[[Any], Any]
"""From a uint8 image [1, H, W, 3], an array, to what the network returns."""


def main(path: str, precision: str, size: str, threads: str, runs: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print
    run = open_network(Path(path), precision, int(threads))
    images = draw_image(*map(int, size.split("x")))
    run(images)
    print("ready", file=answers, flush=True)
    for _ in range(int(runs)):
        began = time.perf_counter()
        run(images)
        seconds = time.perf_counter() - began
    print(seconds, peak_memory(), file=answers, flush=True)


def open_network(path: Path, precision: str, threads: int) -> Run:
    """Load a file into the runtime for it."""
    return (open_pytorch if path.suffix == ".ckpt" else open_exported)(path, precision, threads)


def open_pytorch(path: Path, precision: str, threads: int) -> Run:
    """The network of a checkpoint as prediction runs it, up to the logits."""
    import pem_lightning  # noqa: I001  # before torch: it sets how memory is taken
    import torch
    from hydra.utils import instantiate

    from pem_lightning.inference.optimize import OptimizedNetwork
    from pem_lightning.preprocess import normalize

    torch.set_num_threads(threads)
    checkpoint = pem_lightning.checkpoints.read_checkpoint(path)
    network = instantiate(checkpoint.config["network"], num_classes=checkpoint.info.num_classes)
    pem_lightning.checkpoints.load_network(network, checkpoint)
    fast = OptimizedNetwork(network, precision)
    return lambda images: fast(normalize(torch.from_numpy(images[0]).permute(2, 0, 1))[None])


def open_exported(path: Path, precision: str, threads: int) -> Run:
    """An exported file in its runtime, with the settings that users have; baselines have no metadata to be read."""
    from pem_lightning.deploy.sessions import SESSIONS

    session = object.__new__(SESSIONS[path.suffix])
    session.path = path
    session._open(importlib.import_module(session.runtime), threads, precision, None)
    return session._run


def draw_image(height: int, width: int, seed: int = 0) -> Any:
    """Noise as uint8 RGB [1, H, W, 3]."""
    import numpy as np

    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


def peak_memory() -> float:
    """MiB of this process so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # Linux hands `ru_maxrss` down from the parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main(*sys.argv[1:])
