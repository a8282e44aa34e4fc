"""The authors' algorithm, step by step, without any shortcut: what the fast path is proven and timed against.

Nothing here is used to train, evaluate or predict.
"""

from pem_lightning.straightforward.network import predict
from pem_lightning.straightforward.postprocess import panoptic, semantic

__all__ = ["panoptic", "predict", "semantic"]
