"""What importing the package brings along."""

import pickle
import subprocess
import sys

import pytest

import pem_lightning
from pem_lightning.types import ClassInfo, DatasetInfo

WITHOUT = ("torch", "jaxtyping", "cv2", "scipy", "pycocotools", "omegaconf", "hydra", "lightning", "matplotlib", "rich")

HIDDEN = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WITHOUT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run_hidden(code: str) -> str:
    """What a program prints where only NumPy, Pillow and a runtime are installed."""
    ran = subprocess.run([sys.executable, "-c", HIDDEN + code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("module", ["pem_lightning", "pem_lightning.deploy", "pem_lightning.inference.results"])
def test_imports_without_torch(module):
    assert run_hidden(f"import {module}; print('torch' in sys.modules)") == "False\n"


def test_all_names_are_there():
    for name in pem_lightning.__all__:
        assert getattr(pem_lightning, name) is not None
        assert name in dir(pem_lightning)
    with pytest.raises(AttributeError, match="no attribute 'Predicter'"):
        pem_lightning.Predicter  # noqa: B018


def test_submodules_need_no_import():
    code = (
        "import pem_lightning as p; print(p.build_pem.__name__, p.types.Segment.__name__, p.models.pem, p.files.MAX_ID)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("build_pem Segment <module")


def test_types_pickle():
    info = DatasetInfo("x", (ClassInfo("a", (1, 2, 3), True, 7),))
    assert pickle.loads(pickle.dumps(info)) == info
    old = pickle.dumps(info, 0).replace(b"pem_lightning.basic_types", b"pem_lightning.types")  # of an older version
    assert pickle.loads(old) == info
