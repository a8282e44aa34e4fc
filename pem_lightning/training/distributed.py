"""Between the processes of a training: one per device, over all nodes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import Tensor, nn


def is_distributed() -> bool:
    """Whether there are several processes that can talk to one another."""
    return dist.is_available() and dist.is_initialized()


def mean_over_processes(values: Tensor) -> Tensor:
    """Average a tensor over all processes, in one collective that the host does not wait for.

    Args:
        values: of the same shape in every process; changed in place.

    Returns:
        The mean; with one process the values themselves.
    """
    if is_distributed():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def gather(value: Any) -> list[Any]:
    """The values of all processes by rank, on every one of them. All must call it.

    Args:
        value: small plain data.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class SharedFlag:
    """Is up for all processes once one of them has raised it.

    `tell` only queues work on the device, and `read` waits for that work, but for nothing that was queued after it.
    """

    def __init__(self) -> None:
        self._told: list[tuple[Tensor, torch.cuda.Event | None]] = []

    def tell(self, up: Bool[Tensor, ""]) -> None:
        """Say this process's part; all processes must do so equally often.

        Args:
            up: on the device on which the processes meet.
        """
        number = up.detach().to(torch.float32)
        if is_distributed():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        if not number.is_cuda:
            self._told.append((number, None))
            return
        copy, arrived = torch.empty((), pin_memory=True), torch.cuda.Event()
        copy.copy_(number, non_blocking=True)
        arrived.record()
        self._told.append((copy, arrived))

    def read(self) -> bool:
        """Whether any process has raised it since the last time."""
        told, self._told = self._told, []
        for _, arrived in told:
            if arrived is not None:
                arrived.synchronize()
        return any(bool(number) for number, _ in told)


_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNormCPU(nn.BatchNorm2d):
    """What `nn.SyncBatchNorm` computes, which runs on GPUs only: statistics of all processes' values in training.

    With it a training on CPU processes is the one on GPUs, and can be compared with that of one process.
    """

    def forward(self, input: Float[Tensor, "B C *spatial"]) -> Float[Tensor, "B C *spatial"]:
        """Normalise."""
        if not (self.training and is_distributed()):
            return super().forward(input)
        # Sums in half precision would be useless.
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        return self._normalize(x).to(input.dtype)

    def _normalize(self, x: Tensor) -> Tensor:
        over = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        count = _SumOverProcesses.apply(x.new_full((), x.numel() / x.shape[1]))
        mean = _SumOverProcesses.apply(x.sum(over)) / count
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(over)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_((variance * count / (count - 1)).detach(), momentum)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of spatial dimensions."""


class PlainSyncBatchNorm(TorchSyncBatchNorm):
    """Synchronises PyTorch's own batch normalisations and leaves their subclasses alone.

    PyTorch's conversion takes any subclass for a plain layer: frozen ones would learn their statistics anew, and those
    of timm that hold an activation would lose it. Left alone, a subclass keeps its device's own statistics.

    Args:
        cpu: whether the devices are CPU processes.
    """

    def __init__(self, cpu: bool = False) -> None:
        self.kind = SyncBatchNormCPU if cpu else nn.SyncBatchNorm

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers inside of a model in place; returns the model."""
        for name, child in model.named_children():
            if type(child) in _CONVERTED:
                model.add_module(name, self._converted(child))
            else:
                self.apply(child)
        return model

    def _converted(self, norm: Any) -> nn.Module:
        """The same layer, with the same parameters and buffers, synchronised."""
        synced = self.kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        synced.train(norm.training)
        for name, parameter in norm.named_parameters(recurse=False):
            setattr(synced, name, parameter)
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(synced, name, buffer)
        return synced


class _SumOverProcesses(torch.autograd.Function):
    """Adds up a tensor over all processes; each one's loss depends on every part, so gradients add up as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
