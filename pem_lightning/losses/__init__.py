"""Matching of queries to segments, and the losses of the matched pairs."""

from pem_lightning.losses.criterion import LossTotals, SetCriterion
from pem_lightning.losses.matcher import HungarianMatcher, Match
from pem_lightning.losses.point_sampling import (
    UniformSource,
    choose_uncertain_points,
    sample_masks,
    sample_points,
    uniform,
)

__all__ = [
    "HungarianMatcher",
    "LossTotals",
    "Match",
    "SetCriterion",
    "UniformSource",
    "choose_uncertain_points",
    "sample_masks",
    "sample_points",
    "uniform",
]
