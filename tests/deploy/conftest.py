"""One tiny network, exported once for all tests and for all processes that run them."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from filelock import FileLock
from hydra.utils import instantiate
from omegaconf import OmegaConf

from pem_lightning.checkpoints import CHECKPOINT_KEY
from pem_lightning.data.cityscapes import CITYSCAPES
from pem_lightning.deploy import export
from tests.jobs import TINY, call, compose, unchecked_shapes
from tests.models.randomize import randomize


class TinyExports(NamedTuple):
    """Files of one network: a checkpoint that brings its data set of three drawn validation images, and exports.

    OpenVINO's deformable convolutions are ONNX's; `test_export.py` has its own operator.
    """

    checkpoint: Path
    onnx: Path
    openvino: Path


@pytest.fixture(scope="session")
def tiny_exports(tmp_path_factory) -> TinyExports:
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="needs requirements-export.txt")
    onnx = pytest.importorskip("onnx", reason="needs requirements-export.txt")
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # the other workers' as well
    files = TinyExports(*(folder / "tiny_exports" / f"tiny.{ending}" for ending in ("ckpt", "onnx", "xml")))
    with FileLock(folder / "tiny_exports.lock"):
        if not files.checkpoint.is_file():
            files.checkpoint.parent.mkdir()
            written = write_tiny_checkpoint(files.checkpoint.with_suffix(".new.ckpt"))
            arguments = (f"checkpoint={written}", "deform=gather", f"hydra.run.dir={files.checkpoint.parent}/log")
            with pytest.MonkeyPatch.context() as patch, unchecked_shapes():
                assert call("export", *arguments, f"output={files.onnx}") == 0
                graph = onnx.load(files.onnx)  # is OpenVINO's as well: tracing again would take as long
                patch.setattr(export, "trace", lambda *arguments, **options: None)
                patch.setattr(export, "to_onnx", lambda *arguments: graph)
                assert call("export", *arguments, f"output={files.openvino}") == 0
            written.rename(files.checkpoint)  # when all is there
    return files


def write_tiny_checkpoint(path):
    """A checkpoint as if trained, with random weights; its data set is drawn beside it."""
    overrides = [
        f"dataset.root={path.parent}/drawn",
        *(o for o in TINY if not o.startswith(("dataset.root", "trainer"))),
    ]
    cfg = compose("train", *overrides)
    instantiate(cfg.dataset.datamodule).prepare_data()
    torch.manual_seed(3)  # some segments in each of the images
    network = randomize(instantiate(cfg.network, num_classes=CITYSCAPES.num_classes))
    with torch.no_grad():  # sure of something
        network.transformer_decoder.class_head.weight.mul_(8)
    content = {
        "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
        "global_step": 7,
        CHECKPOINT_KEY: {
            "config": OmegaConf.to_container(cfg, resolve=True),
            "overrides": overrides,
            "dataset_info": CITYSCAPES.to_dict(),
        },
    }
    torch.save(content, path)
    return path
