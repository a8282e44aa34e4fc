"""The authors' algorithm, step by step, without any shortcut: what the fast path is proven and timed against.

Nothing here is used to train, evaluate or predict.
"""

from pem_lightning.straightforward.losses import SetLosses
from pem_lightning.straightforward.network import predict
from pem_lightning.straightforward.postprocess import panoptic, semantic
from pem_lightning.straightforward.training import build_optimizer, prepare

__all__ = ["SetLosses", "build_optimizer", "panoptic", "predict", "prepare", "semantic"]
