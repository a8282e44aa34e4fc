"""What is shown and kept while training: progress, curves, prediction panels, results."""

from pem_lightning.callbacks.curves import Curves
from pem_lightning.callbacks.panels import PredictionPanels
from pem_lightning.callbacks.progress import progress_bar
from pem_lightning.callbacks.results import Results

__all__ = ["Curves", "PredictionPanels", "Results", "progress_bar"]
