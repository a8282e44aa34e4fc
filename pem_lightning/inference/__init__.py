"""From predictions to results. What this names needs torch alone; pictures, files and video are in submodules."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_lightning.inference.postprocess import Instance, instances, panoptic, semantic, semantic_map

__all__ = ["Instance", "instances", "panoptic", "semantic", "semantic_map"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for: `results` and `visualize` work without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("pem_lightning.inference.postprocess"), name)
