"""Batch statistics over all GPUs, for the layers for which that is right."""

from __future__ import annotations

from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

_CONVERTED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class PlainSyncBatchNorm(TorchSyncBatchNorm):
    """Synchronises PyTorch's own batch normalisations and leaves their subclasses alone.

    PyTorch's conversion takes any subclass for a plain layer: frozen ones would learn their statistics anew, and those
    of timm that hold an activation would lose it. Left alone, a subclass keeps its device's own statistics.
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """Convert the layers inside of a model in place; returns the model."""
        for name, child in model.named_children():
            if type(child) in _CONVERTED:
                model.add_module(name, nn.SyncBatchNorm.convert_sync_batchnorm(child))
            else:
                self.apply(child)
        return model
