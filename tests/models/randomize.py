"""Networks in the state in which training leaves them, not in the neutral one of the start."""

import torch

from pem_lightning.models.deformable_conv import DeformableConv


def randomize(network):
    """Give a PEM statistics, scales and offsets that matter; returns it."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, DeformableConv):
            module.offset.weight.data.normal_(0, 0.05)
    return network
