"""Modulated deformable convolution (Zhu et al., "Deformable ConvNets v2", CVPR 2019): one module, several kernels.

Every kernel computes, for output pixel p and the taps k of a 3x3 convolution,

    y(p) = sum_k  W_k  x(p + k + offset_k(p)) * mask_k(p)

where x is sampled bilinearly and is 0 outside.

Legend: B batch, C channels, H W spatial, T taps (9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pem_lightning.types import UserError

Kernel = Callable[..., Tensor]

PIXELS_AT_ONCE = 4096
"""Output pixels sampled at once without gradients (18 MiB at 128 channels)."""


class KernelByName(nn.Module):
    """Has a `kernel`, which a copy or another process looks up again by name: a library's cannot be pickled."""

    def __init__(self, find: Callable[[str], Kernel], name: str) -> None:
        super().__init__()
        self._find, self._name = find, name
        self.kernel = find(name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in super().__getstate__().items() if key != "kernel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.kernel = self._find(self._name)


class DeformableConv(KernelByName):
    """Predicts its own offsets and modulation; starts as an ordinary convolution with its taps halved."""

    def __init__(self, in_channels: int, out_channels: int, kernel: str = "auto") -> None:
        super().__init__(get_kernel, kernel)
        self.offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias: nn.Parameter | None = None  # set when a batch normalisation is fused into it
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """Predict 18 offset channels, (dy, dx) per tap, and 9 modulation logits, then convolve."""
        offsets, mask = self.offset(x).split((18, 9), dim=1)
        out = self.kernel(x, offsets, mask.sigmoid(), self.weight)
        return out if self.bias is None else out.add_(self.bias[:, None, None])


@cache
def get_kernel(name: str) -> Kernel:
    """Look up a kernel: "torch", "torchvision", "mmcv" or "auto"; see `choose_kernel`."""
    libraries = {"mmcv": _mmcv_kernel, "torchvision": _torchvision_kernel}
    return choose_kernel("deformable convolution", name, deform_conv_torch, libraries)


def choose_kernel(operator: str, name: str, plain: Kernel, libraries: Mapping[str, Callable[[str], Kernel]]) -> Kernel:
    """Choose an operator's kernel.

    Args:
        name: "torch"; a library's name; or "auto", on GPUs the first library that works, and "torch" otherwise.
        plain: the kernel "torch", which also runs on all other devices (flops are counted on "meta").
        libraries: the loader of each library's kernel for a device type, which raises if it does not work there.

    Raises:
        UserError: the name is unknown, or its library does not work.
    """
    if name not in ("auto", "torch", *libraries):
        *names, last = "auto", "torch", *libraries
        raise UserError(f"unknown {operator} kernel {name!r}: choose {', '.join(names)} or {last}")
    cuda = ["cuda"] if torch.cuda.is_available() else []
    if name == "torch" or (name == "auto" and not cuda):
        return plain
    kernels: dict[str, Kernel] = {}
    for library in libraries if name == "auto" else [name]:
        try:
            kernels = {device: libraries[library](device) for device in (cuda if name == "auto" else ["cpu", *cuda])}
            break
        except Exception as error:  # a library built for another torch raises anything when it is imported
            if name != "auto":
                hint = "build it with `make mmcv`" if name == "mmcv" else "install it"
                message = f"kernel={name} needs a working {name} ({error}): {hint}, or use kernel=auto"
                raise UserError(message) from error
    return lambda x, *arguments: kernels.get(x.device.type, plain)(x, *arguments)


def deform_conv_torch(
    x: Float[Tensor, "B C_in H W"],
    offsets: Float[Tensor, "B two_T H W"],
    mask: Float[Tensor, "B T H W"],
    weight: Float[Tensor, "C_out C_in k k"],
) -> Float[Tensor, "B C_out H W"]:
    """Compute the operator in plain PyTorch, with padding k // 2; `offsets` are (dy, dx) of every tap in pixels.

    Bilinear sampling is a weighted bag of four corners: `embedding_bag` over channels-last features adds them without
    holding the corners in memory; one matrix product does the rest.
    """
    B, C, H, W = x.shape
    C_out, k = weight.shape[0], weight.shape[-1]
    indices, corner_weights = _corners(offsets.float() if x.dtype != torch.float64 else offsets, mask, k)
    # Without `contiguous` a batch of one would give a strided view, which `embedding_bag` reads nine times as slowly.
    table = x.permute(0, 2, 3, 1).contiguous().view(B * H * W, C).to(corner_weights.dtype)
    flat_weight = weight.permute(0, 2, 3, 1).reshape(C_out, k * k * C)
    if torch.is_grad_enabled() or x.is_cuda:
        samples = F.embedding_bag(indices, table, per_sample_weights=corner_weights, mode="sum").to(x.dtype)
        out = samples.view(B * H * W, k * k * C) @ flat_weight.T
        return out.view(B, H, W, C_out).permute(0, 3, 1, 2)
    # Inference on a CPU: strips of pixels that fit its caches, and a 1x1 convolution, which is faster than the product.
    strips = []
    bags_at_once = PIXELS_AT_ONCE * k * k
    for bags, bag_weights in zip(indices.split(bags_at_once), corner_weights.split(bags_at_once), strict=True):
        samples = F.embedding_bag(bags, table, per_sample_weights=bag_weights, mode="sum").to(x.dtype)
        pixels = samples.view(1, -1, 1, k * k * C).permute(0, 3, 1, 2)
        strips.append(F.conv2d(pixels, flat_weight[:, :, None, None]).permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(strips).view(B, H, W, C_out).permute(0, 3, 1, 2)


def _corners(
    offsets: Float[Tensor, "B two_T H W"], mask: Float[Tensor, "B T H W"], k: int
) -> tuple[Int64[Tensor, "bags 4"], Float[Tensor, "bags 4"]]:
    """Rows of the flattened features, and weights (0 outside the map), of the four corners of every sample.

    A bag is one tap of one output pixel, ordered batch, row, column, tap.
    """
    B, T, H, W = mask.shape

    def count(n: int) -> Float[Tensor, " n"]:
        return torch.arange(n, device=offsets.device, dtype=offsets.dtype)

    taps = count(k) - k // 2
    offsets = offsets.view(B, T, 2, H, W).permute(2, 0, 3, 4, 1)
    y = offsets[0] + (count(H)[:, None, None] + taps.repeat_interleave(k))
    x = offsets[1] + (count(W)[:, None] + taps.repeat(k))
    y, x = y.clamp(-2, H + 1), x.clamp(-2, W + 1)  # nothing is read there; farther away, `long` is undefined
    # Only the integer part is freed of NaN: it shall come out as NaN, not as an index error.
    y0, x0 = y.detach().floor().nan_to_num(), x.detach().floor().nan_to_num()
    fy, fx = y - y0, x - x0
    modulation = mask.permute(0, 2, 3, 1).to(offsets.dtype)
    row_starts = torch.arange(B, device=offsets.device).view(B, 1, 1, 1) * (H * W)

    indices, weights = [], []
    for yi, wy in ((y0, (1 - fy) * modulation), (y0 + 1, fy * modulation)):
        row_inside = (yi >= 0) & (yi < H)
        rows = row_starts + yi.clamp(0, H - 1).long() * W
        for xi, wx in ((x0, 1 - fx), (x0 + 1, fx)):
            inside = row_inside & (xi >= 0) & (xi < W)
            indices.append(rows + xi.clamp(0, W - 1).long())
            weights.append(wy * wx * inside)
    return torch.stack(indices, -1).view(-1, 4), torch.stack(weights, -1).view(-1, 4)


def _torchvision_kernel(device: str) -> Kernel:
    from torchvision.ops import deform_conv2d

    def kernel(x: Tensor, offsets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        padding = weight.shape[-1] // 2
        with torch.autocast(x.device.type, enabled=False):
            features, offsets, mask, weight = at_least_float32(x, offsets, mask, weight)
            return deform_conv2d(features, offsets, weight, padding=padding, mask=mask).to(x.dtype)

    return kernel


def _mmcv_kernel(device: str) -> Kernel:
    from mmcv.ops import modulated_deform_conv2d

    require_cuda_build(device)

    def kernel(x: Tensor, offsets: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
        padding = weight.shape[-1] // 2
        with torch.autocast(x.device.type, enabled=False):
            arguments = [t.contiguous() for t in at_least_float32(x, offsets, mask, weight)]
            return modulated_deform_conv2d(*arguments, None, 1, padding, 1, 1, 1).to(x.dtype)

    return kernel


def require_cuda_build(device: str) -> None:
    """Raise if the device is "cuda" and mmcv has no CUDA operators."""
    from mmcv.ops import get_compiling_cuda_version

    if device == "cuda" and get_compiling_cuda_version() == "not available":
        raise RuntimeError("it is built without CUDA")


def at_least_float32(*tensors: Tensor) -> list[Tensor]:
    """Cast to the first one's type, but at least to float32, which positions and most kernels need."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [tensor.to(dtype) for tensor in tensors]
