"""The documentation's Python runs, on tiny files of the names that it uses."""

import ast
import importlib
import importlib.util
import shutil

import pytest
import torch

import pem_lightning
from pem_lightning import Predictor
from pem_lightning.cli import notebook
from pem_lightning.inference.results import SegmentedImage
from tests.docs.pages import blocks
from tests.jobs import TINIEST

BLOCKS = [block for block in blocks() if block.language == "python"]
WITHOUT_WEIGHTS = {
    'show_report(load_weights(network, "R-50.pkl"))': "needs the file; tests/checkpoints/test_pretrained.py"
}
"""Blocks that hold such a line do not run, and why."""
OTHER = {
    "outputs/.../checkpoints/best.ckpt": "best.ckpt",
    "data/synthetic/leftImg8bit/val/synthetic/synthetic_000005_000000_leftImg8bit.png": "photo.jpg",
    "layers=[5, 6]": "layers=[1, 2]",
    "docs/prototypes.png": "prototypes.png",
    'from_pretrained("folder")': 'from_pretrained("folder", trust=["tests"])',
    'resume="outputs/.../checkpoints/last.ckpt"': 'resume="last.ckpt"',
}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_names_that_are_imported_exist(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, name.name) for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pem_lightning":
            assert hasattr(pem_lightning, node.attr) or importlib.util.find_spec(f"pem_lightning.{node.attr}")


@pytest.fixture
def names(trained, monkeypatch):
    """What the blocks take for granted; what costs much or leaves this machine is made small."""
    train = notebook.train
    small = [o for o in TINIEST if not o.startswith("dataset.")] + ["dataset.num_workers=0", "weights=null"]

    def train_tiny(*, steps, num_queries=20, overrides=(), **arguments):
        assert steps == 2000
        return train(steps=1, overrides=[*small, f"network.num_queries={num_queries}", *overrides], **arguments)

    monkeypatch.setattr(notebook, "train", train_tiny)
    monkeypatch.setattr(Predictor, "push_to_hub", lambda self, name, **options: name)
    if importlib.util.find_spec("supervision") is None:
        monkeypatch.setattr(SegmentedImage, "to_supervision", lambda self: None)
    return {"images": torch.rand(1, 3, 64, 64)}


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/inference.md", "docs/deploy.md"])
def test_blocks_run(page, names, official_weights, request):
    if page == "README.md":
        names["official_state_dict"] = official_weights("city_pan_stdc1", 0)
    if page == "docs/deploy.md":
        shutil.copy(request.getfixturevalue("tiny_exports").onnx, "best.onnx")
        names["images"] = torch.zeros(1, 64, 64, 3, dtype=torch.uint8).numpy()
    for block in BLOCKS:
        if block.place.startswith(f"{page}:") and not any(line in block.text for line in WITHOUT_WEIGHTS):
            text = block.text
            for long, short in OTHER.items():
                text = text.replace(long, short)
            exec(compile(text, block.place, "exec"), names)


def test_every_page_with_python_is_run():
    (mark,) = [mark for mark in test_blocks_run.pytestmark if mark.name == "parametrize"]
    assert {block.place.partition(":")[0] for block in BLOCKS} == set(mark.args[1])
    assert all(any(line in block.text for block in BLOCKS) for line in WITHOUT_WEIGHTS)
