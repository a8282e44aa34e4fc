"""Reading checkpoints: our own, those of the PEM authors, and published weights of backbones."""

from pem_lightning.checkpoints.checkpoint import (
    CHECKPOINT_KEY,
    SHIPPED,
    Checkpoint,
    check_fits,
    convert_old,
    load_network,
    read_checkpoint,
    refuse_exported,
)
from pem_lightning.checkpoints.pretrained import (
    DOWNLOADS,
    LoadReport,
    convert_weights,
    from_official,
    load_weights,
    rename_official_key,
    show_report,
)

__all__ = [
    "CHECKPOINT_KEY",
    "DOWNLOADS",
    "SHIPPED",
    "Checkpoint",
    "LoadReport",
    "check_fits",
    "convert_old",
    "convert_weights",
    "from_official",
    "load_network",
    "load_weights",
    "read_checkpoint",
    "refuse_exported",
    "rename_official_key",
    "show_report",
]
