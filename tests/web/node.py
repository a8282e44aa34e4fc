"""How tests run the page's modules in Node."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.jobs import ROOT

SCRIPT = Path(__file__).with_name("segment.mjs")
ORT = ROOT / "web" / "node_modules" / "onnxruntime-web" / "dist"


def run_node(folder: Path, cases: list[dict]) -> list[dict]:
    """What segment.mjs answers to every case; arrays and files lie in the folder."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node 18 or newer")
    (folder / "cases.json").write_text(json.dumps(cases))
    ran = subprocess.run([node, SCRIPT, folder], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return json.loads((folder / "results.json").read_text())


def write_array(path: Path, array: np.ndarray) -> None:
    path.write_bytes(np.ascontiguousarray(array).tobytes())
