"""The authors' algorithm, step by step and without any shortcut: what the fast path is proven against and timed against.

Nothing here is used to train, evaluate or predict.
"""

from pem_lightning.straightforward.network import predict
from pem_lightning.straightforward.postprocess import panoptic, semantic

__all__ = ["panoptic", "predict", "semantic"]
