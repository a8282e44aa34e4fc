"""Other networks for the same task, from the `transformers` library: random weights, sizes of the published models.

Nothing is downloaded. Each uses its own post-processing from the same library.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Collection
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pem_lightning.benchmark.contestants import Contestant, straightforward_name
from pem_lightning.benchmark.weights import CITYSCAPES_CLASSES, CITYSCAPES_THINGS, RANDOM_OVERLAP_THRESHOLD
from pem_lightning.types import UserError

INSTALL = "python -m pip install -r requirements-bench.txt"


class Peer(Contestant):
    """A network of `transformers`; `processor` does its post-processing."""

    processor: Any

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Run the network."""
        return self.network(pixel_values=images.to(next(self.network.parameters()).dtype))

    def class_logits(self, output: Any) -> Float[Tensor, "B Q _"] | None:
        """Of the mask classifiers."""
        return getattr(output, "class_queries_logits", None)

    def counting_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Shape of the network's input for one image."""
        return 1, 3, height, width

    def meta_network(self) -> nn.Module:
        """The network without values, whose shapes are counted."""
        return self.build().to("meta").eval()

    @abstractmethod
    def build(self) -> nn.Module:
        """Make the network."""

    def gmacs(self, height: int, width: int) -> float:
        """Half of what PyTorch counts: convolutions, matrix products and attention, nothing else."""
        network = self.meta_network()
        images = torch.empty(self.counting_shape(height, width), device="meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(pixel_values=images)
        return counter.get_total_flops() / 2e9


class Mask2Former(Peer):
    """Mask2Former (Cheng et al., CVPR 2022) with ResNet-50: 100 queries, nine decoder layers, as for Cityscapes."""

    def __init__(self, name: str, precision: str) -> None:
        transformers = import_transformers()
        super().__init__(
            f"{name} {precision}", self.build(), baseline=straightforward_name("resnet50"), precision=precision
        )
        self.processor = transformers.Mask2FormerImageProcessorPil()
        self.stuff = set(range(CITYSCAPES_CLASSES)) - CITYSCAPES_THINGS
        self.note = (
            "its post-processing in transformers brings masks to 384 x 384 whatever the image's size, "
            "which costs less and says less than working at full size"
        )

    def build(self) -> nn.Module:
        """Make the network; ResNet is the library's own."""
        transformers = import_transformers()
        backbone = transformers.ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone, num_labels=CITYSCAPES_CLASSES, num_queries=100
        )
        return transformers.Mask2FormerForUniversalSegmentation(config)

    def postprocess(self, output: Any, size: tuple[int, int], tasks: Collection[str]) -> list[Any]:
        """Semantic and panoptic maps."""
        sizes = [size] * len(output.class_queries_logits)
        _to_float32(output)
        results: list[Any] = []
        if "semantic" in tasks:
            results += self.processor.post_process_semantic_segmentation(output, target_sizes=sizes)
        if "panoptic" in tasks:
            results += self.processor.post_process_panoptic_segmentation(
                output,
                threshold=self.threshold,
                overlap_mask_area_threshold=RANDOM_OVERLAP_THRESHOLD,
                label_ids_to_fuse=self.stuff,
                target_sizes=sizes,
            )
        return results


class EoMT(Peer):
    """EoMT (Kerssies et al., CVPR 2025), a plain ViT with patches of 16 pixels, as for Cityscapes: 100 queries.

    It sees square windows of the image's short side, as in its authors' evaluation on Cityscapes, and its attention is
    not masked, as at the end of its training. Its panoptic inference pads the image to a square and is left out.
    """

    tasks = ("semantic",)
    SIZES = {"small": (384, 12, 6, 3), "base": (768, 12, 12, 3), "large": (1024, 24, 16, 4)}  # noqa: RUF012

    def __init__(self, name: str, precision: str, *, size: str, image_size: tuple[int, int]) -> None:
        transformers = import_transformers()
        self.size = size
        self.side = min(image_size)
        if self.side % 16:
            raise UserError(f"{name} needs an image whose short side is a multiple of 16, not {self.side}")
        super().__init__(f"{name} {precision}", self.build(), precision=precision)
        self.processor = transformers.EomtImageProcessorPil()
        self.note = f"{len(self._starts(max(image_size)))} windows of {self.side} x {self.side}; semantic only"

    def build(self) -> nn.Module:
        """Make the network for windows of one size."""
        transformers = import_transformers()
        channels, layers, heads, blocks = self.SIZES[self.size]
        config = transformers.EomtConfig(
            hidden_size=channels,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_blocks=blocks,
            image_size=self.side,
            num_queries=100,
            num_labels=CITYSCAPES_CLASSES,
        )
        network = transformers.EomtForUniversalSegmentation(config)
        network.attn_mask_probs.zero_()
        return network

    def meta_network(self) -> nn.Module:
        """The mask probabilities keep their values, for the network branches on them."""
        network = super().meta_network()
        network.attn_mask_probs = torch.zeros(self.SIZES[self.size][3])
        return network

    def counting_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """All windows of an image."""
        return len(self._starts(max(height, width))), 3, self.side, self.side

    def _starts(self, long_side: int) -> list[int]:
        """Where windows begin along the long side, by the library's own rule."""
        count = -(-long_side // self.side)
        overlap = (count * self.side - long_side) / max(count - 1, 1)
        return [int(i * (self.side - overlap)) for i in range(count)]

    def predict(self, images: Float[Tensor, "B 3 H W"]) -> Any:
        """Run the network on all windows at once."""
        height, width = images.shape[-2:]
        axis = 2 if height > width else 3
        windows, offsets = [], []
        for i, image in enumerate(images):
            for start in self._starts(max(height, width)):
                windows.append(image.narrow(axis - 1, start, self.side))
                offsets.append((i, start, start + self.side))
        dtype = next(self.network.parameters()).dtype
        return self.network(pixel_values=torch.stack(windows).to(dtype), patch_offsets=offsets)

    def postprocess(self, output: Any, size: tuple[int, int], tasks: Collection[str]) -> list[Any]:
        """Semantic maps, put together from the windows."""
        count = 1 + max(image for image, _, _ in output.patch_offsets)
        _to_float32(output)
        shortest = {"shortest_edge": self.side, "longest_edge": None}
        return self.processor.post_process_semantic_segmentation(output, target_sizes=[size] * count, size=shortest)


class SegFormer(Peer):
    """SegFormer (Xie et al., NeurIPS 2021)."""

    tasks = ("semantic",)
    SIZES = {  # noqa: RUF012
        "b0": {"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "decoder_hidden_size": 256},
        "b5": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "decoder_hidden_size": 768},
    }

    def __init__(self, name: str, precision: str, *, size: str) -> None:
        transformers = import_transformers()
        self.size = size
        super().__init__(f"{name} {precision}", self.build(), precision=precision)
        self.processor = transformers.SegformerImageProcessorPil()
        self.note = "semantic only, logits of the classes at a quarter of the size"

    def build(self) -> nn.Module:
        """Make the network."""
        transformers = import_transformers()
        config = transformers.SegformerConfig(num_labels=CITYSCAPES_CLASSES, **self.SIZES[self.size])
        return transformers.SegformerForSemanticSegmentation(config)

    def postprocess(self, output: Any, size: tuple[int, int], tasks: Collection[str]) -> list[Any]:
        """Semantic maps."""
        _to_float32(output)
        return self.processor.post_process_semantic_segmentation(output, target_sizes=[size] * len(output.logits))


PeerFactory = Callable[[str, tuple[int, int]], Peer]
"""(precision, image size) -> peer"""


def _eomt(size: str) -> PeerFactory:
    return lambda precision, image_size: EoMT(f"eomt_{size}", precision, size=size, image_size=image_size)


def _segformer(size: str) -> PeerFactory:
    return lambda precision, image_size: SegFormer(f"segformer_{size}", precision, size=size)


PEERS: dict[str, PeerFactory] = {
    "mask2former_r50": lambda precision, image_size: Mask2Former("mask2former_r50", precision),
    **{f"eomt_{size}": _eomt(size) for size in EoMT.SIZES},
    **{f"segformer_{size}": _segformer(size) for size in SegFormer.SIZES},
}


def build_peer(
    name: str, precision: str, image_size: tuple[int, int], *, device: str | torch.device = "cpu", seed: int = 0
) -> Peer:
    """Make a peer with random weights, in evaluation mode and in a precision.

    Raises:
        UserError: `transformers` cannot be imported, or the peer does not take the size.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peer = PEERS[name](precision, image_size)
    peer.network.eval().requires_grad_(False).to(device, getattr(torch, precision))
    return peer


def import_transformers() -> Any:
    """Import the library, whose advice about models of its own hub is of no use here.

    Raises:
        UserError: it is missing or does not load.
    """
    try:
        import transformers
    except Exception as error:  # a build for another torch raises RuntimeError on import
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"peers need transformers ({reason}): {INSTALL}") from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers


def _to_float32(output: Any) -> None:
    """Post-processing of other precisions is not what is compared."""
    for key, value in output.items():
        if isinstance(value, Tensor):
            output[key] = value.float()
