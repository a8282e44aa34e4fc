"""From predictions to results. What is imported here needs torch alone; pictures, files and video are in submodules."""

from pem_lightning.inference.postprocess import Instance, instances, panoptic, semantic, semantic_map

__all__ = ["Instance", "instances", "panoptic", "semantic", "semantic_map"]
