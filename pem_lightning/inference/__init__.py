"""From predictions to results: post-processing, pictures and files.

`inference.predictor`, which puts data, network and these together, is not imported here, so that post-processing
does not know them.
"""

from pem_lightning.inference.found import FoundInstance, FoundSegment
from pem_lightning.inference.images import find_images, read_image
from pem_lightning.inference.postprocess import Instance, instances, panoptic, semantic
from pem_lightning.inference.results import SegmentedImage, write_coco_panoptic
from pem_lightning.inference.visualize import overlay_panoptic, overlay_semantic, side_by_side

__all__ = [
    "FoundInstance",
    "FoundSegment",
    "Instance",
    "SegmentedImage",
    "find_images",
    "instances",
    "overlay_panoptic",
    "overlay_semantic",
    "panoptic",
    "read_image",
    "semantic",
    "side_by_side",
    "write_coco_panoptic",
]
