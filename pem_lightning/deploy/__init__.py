"""Trained networks outside PyTorch: exporting them, and running them with NumPy and a runtime alone."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem_lightning.deploy.runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    """Imported when it is asked for."""
    if name != "Runtime":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pem_lightning.deploy.runtime import Runtime

    return Runtime
