"""The shapes on the page and in its drawings are those of the network; messages in troubleshooting.md are ours."""

import ast
import re

import pytest
import torch

from pem_lightning import build_pem
from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "how-it-works.md"


def shapes_in(text):
    return [tuple(map(int, found.split(", "))) for found in re.findall(r"\[(\d+(?:, \d+)+)\]", text)]


def shapes_of(value):
    """Of all tensors, without the batch."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        return [shape[1:] if shape[0] == 1 and len(shape) > 2 else shape]
    return [shape for part in value for shape in shapes_of(part)] if isinstance(value, tuple | list) else []


@pytest.fixture(scope="module")
def seen():
    """Inputs and outputs of all modules for an image of 512x1024; without numbers, so it takes no time."""
    with torch.device("meta"):
        network = build_pem("resnet50", num_classes=19).eval()
    found = {}
    for name, module in network.named_modules():
        module.register_forward_hook(
            lambda _, given, out, name=name: found.__setitem__(name, (shapes_of(given), shapes_of(out)))
        )
    with torch.no_grad():
        network(torch.zeros(1, 3, 512, 1024, device="meta"))
    return found


def test_the_table(seen):
    rows = re.findall(r"^\| `([\w.]+)` \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)[1:]
    assert len(rows) == 8
    for name, given, out in rows:
        assert shapes_in(out) == seen[name][1], name
        if shapes_in(given):
            assert set(shapes_in(given)) == set(seen[name][0]), name


@pytest.mark.parametrize("path", sorted(PAGE.parent.glob("how-it-works*.svg")), ids=lambda path: path.stem)
def test_drawings(path, seen):
    known = {shape for pair in seen.values() for shapes in pair for shape in shapes}
    height, width = seen["transformer_decoder.input_projections.0"][1][0][1:]
    known |= {(3, 512, 1024), (height * width, 256)}  # the keys, which no module returns
    shown = shapes_in(path.read_text())
    assert len(shown) > 4
    assert set(shown) <= known
    assert "http" not in path.read_text().replace("http://www.w3.org/2000/svg", "")


def test_messages_are_those_of_the_program():
    """Every part between `...` of a message in the tables' first column is somewhere in the sources."""
    literals = []
    for path in (ROOT / "pem_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                literals.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                literals.append(node.value)
    text = "\n".join(literals)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| (?:[^|`]*: )?`([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 25
    for message in messages:
        for part in message.split("..."):
            assert part.strip(" :;") in text, message
