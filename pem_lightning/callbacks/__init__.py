"""What is shown and kept of training and evaluation: progress, curves, pictures, results, predictions."""

from pem_lightning.callbacks.average_weights import AverageWeights
from pem_lightning.callbacks.confusion import ConfusionMatrix
from pem_lightning.callbacks.curves import Curves
from pem_lightning.callbacks.exact_resume import ExactResume
from pem_lightning.callbacks.last_checkpoint import LastCheckpoint
from pem_lightning.callbacks.measures import LearningRates, Throughput
from pem_lightning.callbacks.non_finite import NonFiniteLoss
from pem_lightning.callbacks.panels import PredictionPanels, WorstImages
from pem_lightning.callbacks.progress import progress_bar
from pem_lightning.callbacks.results import Results
from pem_lightning.callbacks.save_predictions import SavePredictions

__all__ = [
    "AverageWeights",
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
