"""Matching of queries to segments, and the losses of the matched pairs."""

from pem_lightning.losses.criterion import LossTotals, SetCriterion
from pem_lightning.losses.matcher import HungarianMatcher
from pem_lightning.losses.point_sampling import UniformSource

__all__ = ["HungarianMatcher", "LossTotals", "SetCriterion", "UniformSource"]
