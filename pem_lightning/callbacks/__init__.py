"""Callbacks for what Lightning lacks: pictures, results, guards and progress."""

from pem_lightning.callbacks.guards import NonFiniteLoss, early_stopping
from pem_lightning.callbacks.progress import Throughput, progress_bar
from pem_lightning.callbacks.results import Results, SavePredictions
from pem_lightning.callbacks.visualization import ConfusionMatrix, Curves, PredictionPanels, WorstImages
from pem_lightning.training.resume import ExactResume, LastCheckpoint

__all__ = [
    "ConfusionMatrix",
    "Curves",
    "ExactResume",
    "LastCheckpoint",
    "NonFiniteLoss",
    "PredictionPanels",
    "Results",
    "SavePredictions",
    "Throughput",
    "WorstImages",
    "early_stopping",
    "progress_bar",
]
