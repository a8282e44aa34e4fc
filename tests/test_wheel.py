"""The package as pip installs it: from an sdist and a wheel, without the checkout, in an empty folder."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools
from PIL import Image

from pem_lightning import __version__
from tests.jobs import DRAWN

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
SMALL = (
    *DRAWN,
    "dataset.datamodule.num_train=4",
    "dataset.datamodule.num_val=2",
    "backbone=efficientnet_lite0",
    "network.num_layers=1",
    "network.channels=32",
    "network.hidden_channels=32",
    "network.mask_channels=32",
    "network.pyramid_channels=32",
    "num_queries=20",
    "logger=csv",
    "callbacks.panels=null",
    "callbacks.curves=null",
    "callbacks.confusion=null",
    "recipe.global_batch_size=4",
    "recipe.max_steps=2",
    "hydra.run.dir=run",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(int(setuptools.__version__.split(".")[0]) < 77, reason="needs setuptools 77"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the sdist, that from a copy: setuptools leaves files beside its sources."""
    folder = tmp_path_factory.mktemp("build")
    for name in ("pem_lightning", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*(ROOT / name for name in FILES), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, folder)
    sdist = "import setuptools.build_meta as backend; backend.build_sdist('dist')"
    subprocess.run([sys.executable, "-c", sdist], cwd=folder, capture_output=True, timeout=120, check=True)
    (source,) = (folder / "dist").glob("*.tar.gz")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", str(source)]
    subprocess.run(build, cwd=folder, capture_output=True, timeout=120, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def pem(wheel, tmp_path_factory):
    """Runs `pem` of a new environment, which finds our requirements but not the checkout; returns the process."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", symlinks=os.name != "nt")
    python = next((folder / "env").glob("[bS]*/python*"))
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "requirements.pth").write_text(os.path.dirname(os.path.dirname(pytest.__file__)))
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel]
    subprocess.run(install, capture_output=True, timeout=120, check=True)
    empty = folder / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*arguments, code=0):
        command = [python.with_name("pem"), *arguments]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        return done

    run.folder = empty
    return run


def test_the_wheel_holds_configs_tables_and_the_trained_network(wheel):
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        (metadata,) = (archive.read(name).decode() for name in sizes if name.endswith("METADATA"))
    configs = {f"pem_lightning/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs | {"pem_lightning/data/ade20k_classes.csv"} <= sizes.keys()
    for ending in ("ckpt", "md"):
        name = f"pem_lightning/assets/pem_lite0_camvid.{ending}"
        assert sizes[name] == (ROOT / name).stat().st_size
    assert not [name for name in sizes if name.startswith(("tests/", "scripts/", "conf/"))]
    assert "License-Expression: MIT" in metadata
    assert "Requires-Dist: torch==" in metadata
    for path in ROOT.glob("requirements-*.txt"):
        extra = path.stem.removeprefix("requirements-")
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        (first, *_) = (line for line in lines if line and not line.startswith("-r"))
        name = first.replace(">", "=").split("=")[0]
        assert re.search(f"Requires-Dist: {re.escape(name)}.*extra == .{extra}", metadata), extra


@pytest.mark.skipif(importlib.util.find_spec("datumaro") is not None, reason="one message is of its absence")
def test_usage_fits_on_a_screen_and_mistakes_take_a_line(pem):
    usage = pem().stdout
    assert pem("--help").stdout == usage
    assert len(usage.splitlines()) <= 25
    assert max(map(len, usage.splitlines())) <= 100
    assert usage.count("\n  pem ") == 5
    assert pem("--version").stdout == f"pem-lightning {__version__}\n"
    wrong = "error: there is no command trian (did you mean train?); `pem` alone lists them\n"
    assert pem("trian", code=2).stderr == wrong
    assert "did you mean recipe.max_steps?" in pem("train", "recipe.max_step=3", code=2).stderr
    assert pem("check-data", "dataset=ade20k", code=1).stdout.count("pem prepare-ade20k") == 2
    assert "pip install 'pem-lightning[import]'" in pem("import-data", "cvat", ".", "new", code=2).stderr


def test_an_installed_package_does_every_job(pem):
    """Training in two processes, and with a config folder of one's own."""
    Path(pem.folder, "mine/trainer").mkdir(parents=True)
    Path(pem.folder, "mine/trainer/two.yaml").write_text("defaults: [cpu]\ndevices: 2\nstrategy: ddp\n")
    done = pem("train", "--config-dir", "mine", *SMALL, "trainer=two")
    said = done.stdout + done.stderr
    assert "train longer pem train " in said
    assert "predict      pem predict " in said
    assert "python " not in said
    checkpoint = f"checkpoint={pem.folder}/run/checkpoints/last.ckpt"
    photo = next(Path(pem.folder, "drawn").rglob("*_leftImg8bit.png"))
    pem("predict", "checkpoint=camvid", f"input={photo}", "output=found")
    assert Image.open(next(Path(pem.folder, "found").glob("*_overlay.png"))).size == (128, 64)
    pytest.importorskip("onnxscript")
    pem("export", checkpoint, "output=small.onnx")
    assert Path(pem.folder, "small.onnx").stat().st_size > 1e6  # its backbone has 3.4 million weights
