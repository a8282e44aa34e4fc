"""Tensors in an awkward order of memory."""

import torch


def scattered(tensor):
    """The same numbers in reversed order of memory, with gaps."""
    dims = tuple(reversed(range(tensor.ndim)))
    return torch.stack((tensor.permute(dims), -tensor.permute(dims)), dim=-1)[..., 0].permute(dims)
