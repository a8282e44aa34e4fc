"""The authors' algorithm, step by step and without any shortcut: what the fast path is tested and timed against."""

from scripts.benchmark.reference.losses import SetLosses
from scripts.benchmark.reference.network import predict
from scripts.benchmark.reference.postprocess import panoptic, semantic
from scripts.benchmark.reference.training import build_optimizer, prepare

__all__ = ["SetLosses", "build_optimizer", "panoptic", "predict", "prepare", "semantic"]
