"""The authors' algorithm, step by step, without any shortcut: what the fast path is proven and timed against.

Nothing here is used to train, evaluate or predict.
"""

from scripts.benchmark.reference.losses import SetLosses
from scripts.benchmark.reference.network import predict
from scripts.benchmark.reference.postprocess import panoptic, semantic
from scripts.benchmark.reference.training import build_optimizer, prepare

__all__ = ["SetLosses", "build_optimizer", "panoptic", "predict", "prepare", "semantic"]
