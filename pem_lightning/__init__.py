"""PEM (Prototype-based Efficient MaskFormer, CVPR 2024) for panoptic, semantic and instance segmentation."""
