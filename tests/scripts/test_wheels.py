"""The list of wheels, from what is installed here: neither a network nor torch's own packages are needed."""

import os
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from scripts import wheels
from tests.jobs import ROOT, TINIEST


def test_the_list_has_what_requirements_pin_but_not_what_is_there():
    listed = wheels.needed(wheels.HAS, "3.12")
    assert {"lightning", "hydra-core", "torchmetrics", "albumentations", "pytest", "antlr4-python3-runtime"} <= set(
        listed
    )
    assert all(distribution(name).version == version for name, version in listed.items())
    there = wheels.closure(["torch", *wheels.HAS], "3.12")
    assert {"numpy", "typing-extensions", "sympy"} <= set(there)
    assert not set(listed) & {*there, *wheels.UNUSED}
    assert not [name for name in listed if name.startswith(("nvidia", "triton", "torchvision"))]
    bare = wheels.needed((), "3.12")
    assert {"numpy", "scipy", "opencv-python-headless"} <= set(bare)
    assert set(listed) < set(bare)


def test_markers_are_those_of_the_other_python():
    assert "tomli" not in wheels.closure(["pytest"], "3.12")
    assert "setuptools" in wheels.closure(["torch"], "3.12")
    assert wheels.closure(["no-such-package", "pluggy"], "3.12").keys() == {"no-such-package", "pluggy"}


def test_what_is_not_installed_here_cannot_be_pinned(monkeypatch):
    monkeypatch.setattr(wheels, "TESTS", ("no-such-package",))
    with pytest.raises(SystemExit, match="error: no-such-package is not installed here: python -m pip install"):
        wheels.needed(wheels.HAS, "3.12")


def test_pip_is_asked_for_the_pinned_versions(monkeypatch, tmp_path, capsys):
    commands = []

    def run(command):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(wheels.subprocess, "run", run)
    for name in ("lightning-2.0-py3-none-any.whl", "of_mine-1.0-py3-none-any.whl"):
        (tmp_path / name).write_bytes(b"0" * 100_000)
    assert wheels.main([str(tmp_path), "--python-version", "3.13", "--has", "numpy"]) == 0
    download, build = commands
    assert {"--only-binary=:all:", "--no-deps", "--python-version=3.13", "--abi=cp313"} <= set(download)
    assert f"lightning=={distribution('lightning').version}" in download
    assert not [pin for pin in download if pin.startswith(("torch==", "numpy==", "antlr4"))]
    assert build[-2].startswith("antlr4-python3-runtime==")
    assert [path.name for path in tmp_path.iterdir()] == ["of_mine-1.0-py3-none-any.whl"]
    printed = capsys.readouterr().out
    assert "1 wheels, 0.1 MB" in printed
    assert f"{tmp_path}/*.whl && PYTHONPATH=SITE python3 scripts/gpu_check.py --output gpu" in printed


@pytest.fixture(scope="module")
def other_machine(tmp_path_factory):
    """Starts Python with the packages of the list, torch's and `HAS`, and no others."""
    site, version = tmp_path_factory.mktemp("site"), ".".join(map(str, sys.version_info[:2]))
    there = wheels.closure(["torch", *wheels.HAS], version)
    for name in {**wheels.needed(wheels.HAS, version), **{k: v for k, v in there.items() if v}}:
        package = distribution(name)
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(package.locate_file(top)).resolve())

    def start(*arguments, **options):
        environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
        command = [sys.executable, "-S", *arguments]  # without this environment's packages
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, **options)

    assert start("-c", "import wandb").returncode == 1
    return start


@pytest.mark.slow
def test_the_list_is_enough_for_the_tests_and_measurements(other_machine):
    modules = "beartype, pytest, tests.test_gpu, scripts.gpu_check, scripts.benchmark.gpu"
    done = other_machine("-c", f"import {modules}", cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_list_is_enough_to_train(other_machine, tmp_path):
    steps = ("recipe.max_steps=1", "recipe.val_interval=1", "hydra.run.dir=run")
    done = other_machine(str(ROOT / "train.py"), *TINIEST, *steps, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "metrics.json").is_file()
