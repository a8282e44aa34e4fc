"""Reading checkpoints: our own, those of the PEM authors, and published weights of backbones."""

from pem_lightning.checkpoints.download import DOWNLOADS
from pem_lightning.checkpoints.official import from_official, rename_official_key
from pem_lightning.checkpoints.own import CHECKPOINT_KEY, Checkpoint, check_fits, load_network, read_checkpoint
from pem_lightning.checkpoints.report import LoadReport, show_report
from pem_lightning.checkpoints.weights import convert_weights, load_weights

__all__ = [
    "CHECKPOINT_KEY",
    "DOWNLOADS",
    "Checkpoint",
    "LoadReport",
    "check_fits",
    "convert_weights",
    "from_official",
    "load_network",
    "load_weights",
    "read_checkpoint",
    "rename_official_key",
    "show_report",
]
