"""The roofline (Williams et al., 2009): how fast a device could be, at best, at what a network computes and moves.

A network that does F operations and moves B bytes takes at least max(F / peak operations per second, B / bandwidth).
Both ceilings are measured here rather than taken from a data sheet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pem_lightning.benchmark.timing import measure_interleaved

REPETITIONS = 20
"""The best of them counts."""


class Ceilings(NamedTuple):
    """What a device reached at its best.

    Attributes:
        bandwidth: bytes per second, read and written, of copying a tensor larger than the caches.
        matmul: operations per second of a square matrix product, by precision.
        conv: the same of a 3x3 convolution of 256 channels.
    """

    bandwidth: float
    matmul: dict[str, float]
    conv: dict[str, float]

    def peak(self, precision: str) -> float:
        """Operations per second of the better of the two."""
        return max(self.matmul[precision], self.conv[precision])


class Bound(NamedTuple):
    """The least time for a network, in seconds, and what it is bound by: "compute" or "memory"."""

    seconds: float
    by: str


def measure_ceilings(device: str | torch.device, precisions: Iterable[str], small: bool = False) -> Ceilings:
    """Measure a device.

    Args:
        device: with the number of threads that is set.
        precisions: names of floating-point types.
        small: take small operands, to see that it works.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    side = 128 if small else (8192 if on_gpu else 1024)
    height, width = (16, 32) if small else ((256, 512) if on_gpu else (64, 128))
    copied = torch.zeros((1 if small else 1024 if on_gpu else 128) * 2**18, device=device)
    target = torch.empty_like(copied)
    jobs: dict[str, tuple[float, Callable[[], object]]] = {
        "bandwidth": (2 * copied.nbytes, lambda: target.copy_(copied))
    }
    for name in precisions:
        dtype = getattr(torch, name)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        x = torch.randn(1, 256, height, width, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        jobs[f"matmul {name}"] = (2 * side**3, lambda a=a, b=b: a @ b)  # type: ignore[misc]
        jobs[f"conv {name}"] = (2 * 9 * 256**2 * height * width, lambda x=x, w=w: F.conv2d(x, w, padding=1))  # type: ignore[misc]
    with torch.no_grad():
        tasks = {name: lambda clock, job=job: job() for name, (_, job) in jobs.items()}
        timings = measure_interleaved(tasks, rounds=REPETITIONS, device=device)
    best = {name: amount / min(timings[name].total) for name, (amount, _) in jobs.items()}
    return Ceilings(
        best["bandwidth"],
        {name: best[f"matmul {name}"] for name in precisions},
        {name: best[f"conv {name}"] for name in precisions},
    )


def bound(flops: float, moved: float, ceilings: Ceilings, precision: str) -> Bound:
    """The roofline's least time for some operations and some bytes."""
    compute, memory = flops / ceilings.peak(precision), moved / ceilings.bandwidth
    return Bound(max(compute, memory), "compute" if compute >= memory else "memory")


class _BytesMoved(TorchFunctionMode):
    """Adds up the tensors that functions read and write; views move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        sources = list(_tensors((args, kwargs)))
        known = {_storage(t) for t in sources}
        in_place = getattr(func, "__name__", "").rstrip("_") + "_" == getattr(func, "__name__", "")
        written = [t for t in _tensors(result) if in_place or kwargs.get("inplace") or _storage(t) not in known]
        if written:
            self.total += sum(t.nbytes for t in sources) + sum(t.nbytes for t in written)
        return result


def estimate_bytes(predict: Callable[[Tensor], object], images: Tensor) -> int:
    """Estimate the bytes that a network moves: what every function of PyTorch reads and writes, each tensor once.

    Caches make it less; gathers, and kernels that pass over their input several times, make it more.

    Args:
        predict: runs the network, uncompiled.
        images: its input.
    """
    with torch.no_grad(), _BytesMoved() as counter:
        predict(images)
    return counter.total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
