"""Exported files as networks."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from pem_lightning import Predictor
from pem_lightning.checkpoints import read_checkpoint
from pem_lightning.deploy.network import ExportedNetwork, UInt8Network
from pem_lightning.deploy.sessions import open_session
from pem_lightning.preprocess import normalize
from pem_lightning.types import UserError
from tests.jobs import ROOT

SUFFIXES = ("onnx", "openvino")


def noise(*size):
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_normalisation_is_undone_exactly():
    """For every grey level of every channel; what lies between and beyond is rounded."""
    seen = []

    def run(images):
        seen.append(images)
        return np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 8, 8), np.float32)

    network = UInt8Network(run)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, -1, -1)
    network(normalize(levels)[None])
    assert np.array_equal(seen[0], levels.permute(1, 2, 0).numpy()[None])
    step = normalize(noise(3, 1, 1) // 255 + 1) - normalize(noise(3, 1, 1) // 255)  # a grey level
    network((normalize(levels) + 0.4 * step)[None])
    network((normalize(levels) + 300 * step)[None])
    assert np.array_equal(seen[1], seen[0])
    assert (seen[2] == 255).all()


@pytest.mark.parametrize("name", SUFFIXES)
def test_a_file_is_a_network(tiny_exports, name):
    """Any size, several images at once, copies; logits near the checkpoint's and no pixel of the results differs."""
    path = getattr(tiny_exports, name)
    exported = read_checkpoint(path)
    network = ExportedNetwork(exported.session)
    trained = Predictor(tiny_exports.checkpoint, device="cpu")
    images = torch.stack([normalize(image) for image in noise(2, 3, 70, 97)])
    found, expected = network(images), trained.model(images)
    for logits, wanted in zip(found[:2], expected[:2], strict=True):
        assert logits.dtype == torch.float32
        assert (logits - wanted).abs().max() < 1e-3 * wanted.abs().max()
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(images).mask_logits, found.mask_logits)
    assert (exported.step, exported.info, exported.resumable) == (
        7,
        read_checkpoint(tiny_exports.checkpoint).info,
        False,
    )
    predictor = Predictor(path, device="cpu", batch_size=2)
    photos = sorted((tiny_exports.checkpoint.parent / "drawn/leftImg8bit/val").rglob("*.png"))
    assert len(photos) == 3
    for one, other in zip(predictor(photos), trained(photos), strict=True):
        assert len(one.segments) > 2
        assert torch.equal(torch.as_tensor(one.panoptic), torch.as_tensor(other.panoptic))
        assert [s.name for s in one.segments] == [s.name for s in other.segments]


def test_options_of_exported_files(tiny_exports, monkeypatch):
    """bfloat16 is for OpenVINO, compilation for nobody; a device that the runtime has not is refused."""
    images = torch.zeros(1, 3, 64, 64)
    openvino, onnx = (open_session(path) for path in (tiny_exports.openvino, tiny_exports.onnx))
    assert ExportedNetwork(openvino, "bfloat16", device="cpu")(images).class_logits.isfinite().all()
    for session, options, message in (
        (onnx, {"precision": "bfloat16"}, "is for OpenVINO's .xml files"),
        (openvino, {"precision": "float16"}, "choose float32 or bfloat16"),
        (onnx, {"compile": "default"}, "has a runtime of its own"),
        (onnx, {"device": "cuda"}, "install onnxruntime-gpu"),
        (openvino, {"device": "cuda:1"}, "runs on the CPU"),
    ):
        with pytest.raises(UserError, match=message):
            ExportedNetwork(session, **options)
    object.__setattr__(onnx.metadata, "results", "panoptic")
    with pytest.raises(UserError, match="export the checkpoint with results=false"):
        ExportedNetwork(onnx)


def test_a_file_for_one_size(tiny_exports):
    """Takes several images one by one, and names the size when another is given."""
    session = open_session(tiny_exports.onnx)
    whole = session.run(noise(2, 64, 96, 3).numpy())
    object.__setattr__(session.metadata, "size", (64, 96))
    for one, other in zip(session.run(noise(2, 64, 96, 3).numpy()), whole, strict=True):
        assert np.abs(one - other).max() < 1e-3
    with pytest.raises(UserError, match="takes images of 96 x 64 pixels, not 64 x 96"):
        session.run(np.zeros((1, 96, 64, 3), np.uint8))


CLOSED_ELSEWHERE = """
import signal, subprocess, sys, threading
from pem_lightning.deploy.sessions import open_session
signal.signal(signal.SIGCHLD, lambda *event: None)
sessions = [open_session(sys.argv[1])]
thread = threading.Thread(target=sessions.clear)
thread.start()
thread.join()
subprocess.run([sys.executable, "-c", ""])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGCHLD")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sessions_that_end_in_another_thread_leave_signals_in_order(tiny_exports, suffix):
    command = [sys.executable, "-c", CLOSED_ELSEWHERE, getattr(tiny_exports, suffix)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
