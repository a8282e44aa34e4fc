"""Modulated deformable convolution (Zhu et al., "Deformable ConvNets v2", CVPR 2019): one module, several kernels.

Every kernel computes, for output pixel p and the K taps k of a 3x3 convolution,

    y(p) = sum_k  W_k  x(p + k + offset_k(p)) * mask_k(p)

with x sampled bilinearly and 0 outside. The default kernel is plain PyTorch and runs everywhere.

Legend: B batch, C channels, H W spatial, T taps (9).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pem_lightning.types import UserError

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


PIXELS_AT_ONCE = 4096
"""How many output pixels are sampled at once where no gradient is wanted (18 MiB at 128 channels)."""


def deform_conv_torch(
    x: Float[Tensor, "B C_in H W"],
    offsets: Float[Tensor, "B two_T H W"],
    mask: Float[Tensor, "B T H W"],
    weight: Float[Tensor, "C_out C_in k k"],
) -> Float[Tensor, "B C_out H W"]:
    """The operator in plain PyTorch, exact with all gradients.

    Bilinear sampling is a weighted bag of four corner features, so `embedding_bag` over channels-last features
    gathers, weighs and adds them without ever holding the four corners; one matrix product does the rest.

    Args:
        x: input features.
        offsets: (dy, dx) of tap 0, (dy, dx) of tap 1, ... in pixels.
        mask: modulation of every tap.
        weight: of an ordinary k x k convolution with padding k // 2 and stride 1.
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
    # Inference on a CPU: strips of pixels, and a 1x1 convolution instead of the product, faster and rounded less well.
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
    """Row indices into the flattened features, and weights, of the four corners of every sample.

    A bag is one tap of one output pixel, ordered batch, row, column, tap. A corner outside the map keeps a valid index
    and gets weight 0.
    """
    B, T, H, W = mask.shape

    def count(n: int) -> Float[Tensor, " n"]:
        return torch.arange(n, device=offsets.device, dtype=offsets.dtype)

    taps = count(k) - k // 2
    offsets = offsets.view(B, T, 2, H, W).permute(2, 0, 3, 4, 1)
    y = offsets[0] + (count(H)[:, None, None] + taps.repeat_interleave(k))
    x = offsets[1] + (count(W)[:, None] + taps.repeat(k))
    # Far outside nothing is read; the clamp keeps the integer conversion below defined.
    y, x = y.clamp(-2, H + 1), x.clamp(-2, W + 1)
    # A NaN must come out as NaN and not as an index error, hence it is kept out of the integer part only.
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


_KERNELS = Kernels(
    "deformable convolution",
    plain=deform_conv_torch,
    others={"torchvision": _torchvision_kernel, "mmcv": _mmcv_kernel},
    # The CPU's order is measured (`scripts/benchmark.py --kernels`). CUDA's is not: mmcv's is one fused kernel, and who
    # has built mmcv for a GPU has built it for this. torchvision's is alike, but often there by chance.
    fastest={"cpu": ("torch",), "cuda": ("mmcv", "torch")},
)


@cache
def get_kernel(name: str) -> Kernel:
    """Look up a kernel: "torch", "torchvision", "mmcv", or "auto" (the fastest installed for the features' device).

    Raises:
        UserError: the name is unknown, or its library cannot be loaded.
    """
    return _KERNELS.get(name)


class DeformableConv(nn.Module):
    """3x3 modulated deformable convolution that predicts its own offsets and modulation.

    Starts as an ordinary convolution with every tap weighed 1/2: the offset layer is initialised to zero.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: str = "auto") -> None:
        super().__init__()
        self.offset = nn.Conv2d(in_channels, 27, 3, padding=1)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias: nn.Parameter | None = None  # filled when a batch normalisation is folded in
        self.kernel = get_kernel(kernel)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Float[Tensor, "B C_in H W"]) -> Float[Tensor, "B C_out H W"]:
        """Predict 18 offset channels, (dy, dx) per tap, and 9 modulation logits, then convolve."""
        offsets, mask = self.offset(x).split((18, 9), dim=1)
        out = self.kernel(x, offsets, mask.sigmoid(), self.weight)
        return out if self.bias is None else out.add_(self.bias[:, None, None])
