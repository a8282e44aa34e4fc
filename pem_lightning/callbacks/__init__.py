"""What is shown and kept of training and evaluation: progress, curves, pictures, results, predictions."""

from pem_lightning.callbacks.guards import NonFiniteLoss
from pem_lightning.callbacks.progress import LearningRates, Throughput, progress_bar
from pem_lightning.callbacks.results import Results, SavePredictions
from pem_lightning.callbacks.visualization import ConfusionMatrix, Curves, PredictionPanels, WorstImages
from pem_lightning.training.resume import ExactResume, LastCheckpoint

__all__ = [
    "ConfusionMatrix",
    "Curves",
    "ExactResume",
    "LastCheckpoint",
    "LearningRates",
    "NonFiniteLoss",
    "PredictionPanels",
    "Results",
    "SavePredictions",
    "Throughput",
    "WorstImages",
    "progress_bar",
]
