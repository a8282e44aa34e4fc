"""Choosing among the implementations of an operator, its kernels: by name, or the fastest for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pem_lightning.errors import UserError

Kernel = Callable[..., Tensor]
Loader = Callable[[str], Kernel]
"""Device type -> kernel; raises whatever is wrong with the library."""


@dataclass(frozen=True)
class Kernels:
    """An operator's kernels.

    Attributes:
        operator: its name in messages.
        plain: the kernel "torch", in plain PyTorch, which runs on every device.
        others: loaders of the rest, by the name of their library.
        fastest: names by device type, the fastest first. "torch" elsewhere.
    """

    operator: str
    plain: Kernel
    others: Mapping[str, Loader]
    fastest: Mapping[str, tuple[str, ...]]

    def get(self, name: str) -> Kernel:
        """Look up a kernel by name. Anything but "torch" decides by the device of its first argument at every call.

        Raises:
            UserError: the name is unknown, or its library cannot be loaded.
        """
        if name == "torch":
            return self.plain
        if name == "auto":
            return _by_device({device: self._fastest(device) for device in self.fastest}, self.plain)
        if name not in self.others:
            names = ", ".join(["auto", "torch", *list(self.others)[:-1]]) + f" or {list(self.others)[-1]}"
            raise UserError(f"unknown {self.operator} kernel {name!r}: choose {names}")
        try:
            devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
            kernels = {device: self.others[name](device) for device in devices}
        except Exception as error:  # a torchvision built for another torch raises RuntimeError on import
            cure = "build it with `make mmcv`" if name == "mmcv" else "install it"
            raise UserError(f"kernel={name} needs a working {name} ({error}): {cure}, or use kernel=auto") from error
        return _by_device(kernels, self.plain)  # on the meta device, too, where multiply-accumulates are counted

    def _fastest(self, device: str) -> Kernel:
        """The first of the device's kernels that is installed; libraries are imported only where the device exists."""
        if device == "cuda" and not torch.cuda.is_available():
            return self.plain
        for name in self.fastest[device]:
            if name == "torch":
                break
            try:
                return self.others[name](device)
            except Exception:  # not installed, or not for this device or this torch
                continue
        return self.plain


def _by_device(kernels: Mapping[str, Kernel], default: Kernel) -> Kernel:
    def kernel(x: Tensor, *arguments: Any) -> Tensor:
        return kernels.get(x.device.type, default)(x, *arguments)

    return kernel


def require_cuda_build(device: str) -> None:
    """Complain about an mmcv without CUDA operators, if the device is to be "cuda"."""
    from mmcv.ops import get_compiling_cuda_version

    if device == "cuda" and get_compiling_cuda_version() == "not available":
        raise RuntimeError("it is built without CUDA")


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """Cast to the first one's type, but no less than float32: positions need it, and most kernels know no less."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]
