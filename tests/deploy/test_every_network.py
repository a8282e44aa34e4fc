"""Every kind of backbone and every ablation, in small, runs in ONNX Runtime and OpenVINO as it does in PyTorch."""

import numpy as np
import pytest
import torch

from pem_lightning.deploy.check import compare_logits, predict
from pem_lightning.deploy.export import to_onnx, to_openvino, trace
from pem_lightning.deploy.graph import ExportGraph
from pem_lightning.deploy.sessions import openvino_core
from pem_lightning.models.backbones import build_backbone
from tests.deploy.test_graph import VARIANTS
from tests.jobs import unchecked_shapes
from tests.models.randomize import build_tiny, randomize
from tests.models.test_ablations import network_of
from tests.models.test_timm import needs_timm

onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
pytest.importorskip("openvino", reason="needs requirements-export.txt")
pytest.importorskip("onnxscript", reason="needs requirements-export.txt")

pytestmark = pytest.mark.slow
SIZE = 64, 96
"""One size is traced in a fraction of the time of any size, which tests/deploy/test_export.py has."""


@torch.no_grad()
def assert_runs(network, graph, deform="gather"):
    with unchecked_shapes():
        proto = to_onnx(trace(graph, SIZE), deform)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    compiled = openvino_core().compile_model(to_openvino(proto), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = np.random.default_rng(0).integers(0, 256, (1, *SIZE, 3), np.uint8)
    wanted = predict(network, images)
    for found in (tuple(session.run(None, {"images": images})), tuple(compiled({"images": images}).values())):
        difference = compare_logits(wanted, found)
        assert difference.deviation < 1e-4
        assert difference.sign_flips < 1e-4


WITHIN_OTHERS = {"no_deep_supervision", "no_prototype", "no_interaction", "no_masking", "fpn"}


@pytest.mark.parametrize("variant", sorted({name for name, _ in VARIANTS} - WITHIN_OTHERS))
def test_every_ablation(variant):
    network = randomize(network_of(variant, 1)).eval()
    if variant == "msdeform":
        del network.pixel_decoder.layers[1:]
    assert_runs(network, ExportGraph(network, "gather" if variant == "msdeform" else "operator"))


@pytest.mark.parametrize(
    ("name", "norm"), [("resnet18", "frozen"), ("stdc1", "batch"), ("efficientnet_lite0", "batch")]
)
def test_every_kind_of_backbone(name, norm):
    torch.manual_seed(0)
    network = randomize(build_tiny(backbone=build_backbone(name, norm), num_layers=1)).eval()
    assert_runs(network, ExportGraph(network, "operator"))


def test_grid_sample():
    network = randomize(build_tiny(num_layers=1)).eval()
    assert_runs(network, ExportGraph(network, "operator"), "grid_sample")


@needs_timm
def test_a_backbone_of_timm():
    from pem_lightning.models.backbones.timm import TimmBackbone

    network = randomize(build_tiny(backbone=TimmBackbone("convnext_atto"), num_layers=1)).eval()
    assert_runs(network, ExportGraph(network, "operator"))
