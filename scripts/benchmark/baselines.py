"""Other networks for the same task, from `transformers`: random weights, sizes of the published models, no download."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pem_lightning.data import CITYSCAPES
from pem_lightning.preprocess import IMAGE_MEAN, IMAGE_STD
from pem_lightning.types import UserError
from scripts.benchmark.common import NUM_CLASSES, choose_threshold
from scripts.benchmark.runner import draw_image, open_network

SEGFORMER = {
    "segformer_b0": {"hidden_sizes": (32, 64, 160, 256), "depths": (2, 2, 2, 2), "decoder_hidden_size": 256},
    "segformer_b5": {"hidden_sizes": (64, 128, 320, 512), "depths": (3, 6, 40, 3), "decoder_hidden_size": 768},
}
EOMT = {
    "eomt_small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "num_blocks": 3},
    "eomt_base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_blocks": 3},
    "eomt_large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "num_blocks": 4},
}
LOGITS = ("class_queries_logits", "masks_queries_logits", "logits")
LARGEST_DEVIATION = 1e-3  # of logits from PyTorch's, relative to the largest
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


class ExportGraph(nn.Module):
    """A baseline from uint8 RGB images to its logits, as PEM is exported."""

    mean: Tensor
    std: Tensor

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.network, self.inputs = baseline.network, baseline.inputs
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN))
        self.register_buffer("std", torch.tensor(IMAGE_STD))

    def forward(self, images: UInt8[Tensor, "B H W 3"]) -> tuple[Tensor, ...]:
        """Logits of queries and masks, or of classes; of every window, where the baseline looks at windows."""
        normalized = (images - self.mean) / self.std
        output = self.network(**self.inputs(normalized.permute(0, 3, 1, 2)))
        return tuple(output[key] for key in LOGITS if key in output)


def export_baseline(name: str, size: tuple[int, int], folder: Path) -> list[list[int]]:
    """Write a baseline for images of a size as model.onnx, and model.xml made of it; returns its logits' shapes.

    Raises:
        UserError: a library is missing, or a runtime's logits are not PyTorch's.
    """
    import openvino

    baseline = build_baseline(name, "float32", size, "cpu")
    graph, images = ExportGraph(baseline).eval(), draw_image(*size)
    inputs = (torch.from_numpy(images),)
    program = torch.onnx.export(graph, inputs, input_names=["images"], dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    program.save(folder / "model.onnx")
    openvino.save_model(openvino.convert_model(folder / "model.onnx"), folder / "model.xml", compress_to_fp16=False)
    with torch.no_grad():
        expected = graph(*inputs)
    for file in ("model.onnx", "model.xml"):
        found = open_network(folder / file, "float32", torch.get_num_threads())(images)
        for a, b in zip(found, expected, strict=True):
            if (deviation := float((torch.from_numpy(a) - b).abs().max() / b.abs().max())) > LARGEST_DEVIATION:
                raise UserError(f"logits of {file} deviate by {deviation:.1g}")
    return [list(logits.shape) for logits in expected]


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
        del self.network.attn_mask_probs
        self.network.attn_mask_probs = [0.0] * EOMT[name]["num_blocks"]  # numbers: of a tensor, export cannot know them

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
