"""The notebooks, as they are in git and as they run: from the first cell to the last, on a tiny run of train.py."""

import json
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell
from traitlets.config import Config

from tests.jobs import TINY, call

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BY_NAME = {path.stem: path for path in NOTEBOOKS}

UNTRAINED = (
    "criterion.mask_weight=0.0",
    "criterion.dice_weight=0.0",
    "criterion.no_object_weight=0.0",
    "task.inference.object_mask_threshold=0.0",
    "task.inference.overlap_threshold=0.0",
)
"""A few steps make masks empty and classes "no object"; without those losses there are segments to look at."""


def read(path):
    return nbformat.read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_in_git_are_clean(path):
    """Valid, without outputs, and about no machine in particular."""
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    for cell in notebook.cells:
        assert cell.source.strip()
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
            compile(cell.source, cell.id, "exec")
    text = path.read_text()
    for place in ("/home/", "/root", "/tmp", "/Users/", "C:\\\\", str(ROOT)):
        assert place not in text
    assert path.stat().st_size < 50_000
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert notebook.cells.index(parameters) == 1


@pytest.fixture(scope="module")
def trained(work):
    """A folder with runs of two variants, and what was drawn for them."""
    pictures = [f"callbacks.{name}=null" for name in ("panels", "curves", "confusion")]
    common = (*TINY, *UNTRAINED, "network.num_layers=6", "recipe.max_steps=2", "recipe.val_interval=1", *pictures)
    assert call("train", *common, "hydra.run.dir=runs/default") == 0
    assert call("train", *common, "ablation=no_masking", "hydra.run.dir=runs/unmasked") == 0
    return work


@pytest.fixture
def kernel(monkeypatch):
    """The settings of a kernel of this very Python; its sockets are files, which no other process takes for its own."""
    with tempfile.TemporaryDirectory(prefix="pem") as folder:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        spec = Path(folder) / "kernels" / "own" / "kernel.json"
        spec.parent.mkdir(parents=True)
        spec.write_text(json.dumps({"argv": command, "display_name": "own", "language": "python"}))
        for name in ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"):
            monkeypatch.setenv(name, folder)
        yield Config(KernelManager={"transport": "ipc", "ip": f"{folder}/socket"})


def execute(name, kernel, **parameters):
    """Run a notebook with other values for its parameters; returns it with its outputs."""
    notebook = read(BY_NAME[name])
    values = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(2, new_code_cell(values))
    place = {"metadata": {"path": str(BY_NAME[name].parent)}}
    NotebookClient(
        notebook, kernel_name="own", config=kernel, timeout=300, resources=place, shutdown_kernel="immediate"
    ).execute()
    return notebook


def outputs_of(notebook, cell_id):
    (cell,) = [cell for cell in notebook.cells if cell.id == cell_id]
    return cell.outputs


def shows_picture(outputs):
    return any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_quickstart_runs(trained, kernel):
    (image, *_) = sorted(trained.glob("drawn/leftImg8bit/val/*/*.png"))
    checkpoint = trained / "runs/default/checkpoints/best.ckpt"
    notebook = execute("quickstart", kernel, CHECKPOINT=str(checkpoint), IMAGE=str(image))
    assert "stdc1 on synthetic" in outputs_of(notebook, "load")[0].text
    for cell_id in ("predict", "semantic", "trace", "masks", "statistics"):
        assert shows_picture(outputs_of(notebook, cell_id)), cell_id
    assert "score" in outputs_of(notebook, "segments")[0].data["text/html"]
    assert "cells chosen" in outputs_of(notebook, "statistics-table")[0].data["text/html"]


@pytest.mark.slow
def test_the_ablations_run(trained, kernel):
    notebook = execute("ablations", kernel, RUNS=[str(trained / "runs")])
    assert ": 2 variants, 2 runs" in outputs_of(notebook, "read")[0].text
    table = outputs_of(notebook, "table")[0].data["text/html"]
    assert "PEM" in table
    assert "no masking" in table
    for cell_id in ("differences", "curves"):
        assert shows_picture(outputs_of(notebook, cell_id)), cell_id


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("quickstart", {"CHECKPOINT": "nothing.ckpt"}, "nothing.ckpt does not exist"),
        ("ablations", {"RUNS": ["nothing"]}, "run `make ablations` or `make demo` first"),
    ],
)
def test_a_notebook_with_nothing_to_show_names_the_cure(kernel, name, parameters, message):
    with pytest.raises(CellExecutionError) as error:
        execute(name, kernel, **parameters)
    assert error.value.ename == "UserError"
    assert message in error.value.evalue
