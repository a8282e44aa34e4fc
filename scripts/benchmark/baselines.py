"""Other networks for the same task, from `transformers`: random weights, sizes of the published models, no download."""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pem_lightning.data import CITYSCAPES
from pem_lightning.types import UserError
from scripts.benchmark.common import NUM_CLASSES, choose_threshold

SEGFORMER = {
    "segformer_b0": {"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "decoder_hidden_size": 256},
    "segformer_b5": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "decoder_hidden_size": 768},
}
EOMT = {
    "eomt_small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3},
    "eomt_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_blocks": 3},
    "eomt_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_blocks": 4},
}
BASELINES = ("mask2former_r50", *SEGFORMER, *EOMT)


def build_baseline(name: str, precision: str, size: tuple[int, int], device: str) -> Baseline:
    """Make one of `BASELINES` for images of a size, in evaluation mode.

    Raises:
        UserError: `transformers` cannot be imported, or the network does not take the size.
    """
    try:
        import transformers
    except Exception as error:  # a build for another torch raises RuntimeError
        raise UserError(f"{name} needs transformers: python -m pip install -r requirements-bench.txt") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it advises about models of its own hub
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name in EOMT:
            baseline: Baseline = EoMT(transformers, name, size)
        elif name in SEGFORMER:
            note = "semantic maps only, from logits of the classes at a quarter of the size"
            baseline = Baseline(transformers, "Segformer", "Semantic", note, **SEGFORMER[name])
        else:
            note = "its post-processing brings masks to 384 x 384 whatever the image's size, which costs less"
            backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
            settings = {"backbone_config": backbone, "num_queries": 100}
            baseline = Mask2Former(transformers, "Mask2Former", "Universal", note, **settings)
    baseline.network.eval().requires_grad_(False).to(device, getattr(torch, precision))
    return baseline


class Baseline:
    """A network with its library's post-processing; `note` is what a reader has to know to judge its numbers.

    As it is, SegFormer (Xie et al., NeurIPS 2021).
    """

    def __init__(self, transformers: Any, name: str, kind: str, note: str, **settings: Any) -> None:
        config = getattr(transformers, f"{name}Config")(num_labels=NUM_CLASSES, **settings)
        self.network: Any = getattr(transformers, f"{name}For{kind}Segmentation")(config)
        self.processor = getattr(transformers, f"{name}ImageProcessorPil")()
        self.note = note

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Run the network; logits come out in float32, for post-processing is not compared in other precisions."""
        output = self.network(**self.inputs(images.to(next(self.network.parameters()).dtype)))
        for key, value in output.items():
            if isinstance(value, Tensor):
                output[key] = value.float()
        return output

    def inputs(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Any]:
        """Arguments of the network."""
        return {"pixel_values": images}

    def postprocess(self, output: Any, size: tuple[int, int]) -> list[Any]:
        """Maps of every image."""
        return self.processor.post_process_semantic_segmentation(output, target_sizes=[size] * len(output.logits))

    @torch.no_grad()
    def gmacs(self, images: Float[Tensor, "B 3 H W"]) -> float:
        """Half of what PyTorch counts: convolutions and matrix products, those of attention included."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.predict(images)
        return counter.get_total_flops() / 2e9 / len(images)


class Mask2Former(Baseline):
    """Mask2Former (Cheng et al., CVPR 2022) with ResNet-50: 100 queries, nine decoder layers, as for Cityscapes."""

    def postprocess(self, output: Any, size: tuple[int, int]) -> list[Any]:
        """Semantic and panoptic maps of every image."""
        sizes = [size] * len(output.class_queries_logits)
        semantic = self.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        return semantic + self.processor.post_process_panoptic_segmentation(
            output,
            threshold=choose_threshold(output.class_queries_logits[0]),
            overlap_mask_area_threshold=0.0,  # masks of random networks lie across one another
            label_ids_to_fuse=set(range(NUM_CLASSES)) - CITYSCAPES.thing_classes,
            target_sizes=sizes,
        )


class EoMT(Baseline):
    """EoMT (Kerssies et al., CVPR 2025), a plain ViT with patches of 16 pixels, as for Cityscapes: 100 queries.

    It sees square windows of the image's short side, as its authors evaluate it on Cityscapes; its attention is not
    masked, as at the end of its training. Its panoptic inference pads the image to a square and is left out.
    """

    def __init__(self, transformers: Any, name: str, size: tuple[int, int]) -> None:
        self.side, long_side = sorted(size)
        if self.side % 16:
            raise UserError(f"{name} needs an image whose short side is a multiple of 16, not {self.side}")
        # Where windows start along the long side, by the library's own rule.
        count = -(-long_side // self.side)
        overlap = (count * self.side - long_side) / max(count - 1, 1)
        self.starts = [int(i * (self.side - overlap)) for i in range(count)]
        note = f"semantic maps only, of {count} windows of {self.side} x {self.side}"
        super().__init__(transformers, "Eomt", "Universal", note, **EOMT[name], image_size=self.side, num_queries=100)
        self.network.attn_mask_probs.zero_()

    def inputs(self, images: Float[Tensor, "B 3 H W"]) -> dict[str, Any]:
        """All windows of all images, and where they are."""
        axis = 1 if images.shape[2] > images.shape[3] else 2
        places = [(i, start, start + self.side) for i in range(len(images)) for start in self.starts]
        windows = [images[i].narrow(axis, start, self.side) for i, start, _ in places]
        return {"pixel_values": torch.stack(windows), "patch_offsets": places}

    def postprocess(self, output: Any, size: tuple[int, int]) -> list[Any]:
        """Semantic maps of every image, put together from the windows."""
        sizes = [size] * (len(output.patch_offsets) // len(self.starts))
        shortest = {"shortest_edge": self.side, "longest_edge": None}
        return self.processor.post_process_semantic_segmentation(output, target_sizes=sizes, size=shortest)
