"""`make mmcv` up to the compiler itself, which takes minutes."""

import subprocess
import sys

import pytest
import torch

from scripts import build_mmcv


@pytest.fixture
def calls(monkeypatch):
    """Arguments and environments of what would be run; mmcv is missing."""
    seen = []

    def run(command, env=None, **options):
        seen.append((command, env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build_mmcv, "installed", lambda cuda: ("", "No module named 'mmcv'"))
    monkeypatch.setattr(build_mmcv.subprocess, "run", run)
    return seen


def test_nothing_is_built_twice(monkeypatch, capsys, calls):
    monkeypatch.setattr(build_mmcv, "installed", lambda cuda: ("2.2.0", ""))
    assert build_mmcv.main() == 0
    assert "is already installed" in capsys.readouterr().out
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for operators for CPUs")
def test_it_builds_what_is_missing(monkeypatch, capsys, calls):
    answers = iter([("", "No module named 'mmcv'"), ("2.2.0", "")])
    monkeypatch.setattr(build_mmcv, "installed", lambda cuda: next(answers))
    monkeypatch.setattr(build_mmcv, "check_tools", lambda cuda: None)
    assert build_mmcv.main() == 0
    announced, done = capsys.readouterr().out.splitlines()
    assert announced.startswith("Building mmcv==2.2.0 with operators for the CPU and torch 2.")
    assert "minutes" in announced
    assert done == "mmcv 2.2.0 with operators for the CPU is installed, after 0 minutes"
    (first, _), (second, _), (last, environment) = calls
    assert f"torch=={torch.__version__}" in first  # pip then leaves it alone
    assert all("--no-deps" in command for command in (second, last))
    assert last[:4] == [sys.executable, "-m", "pip", "install"]
    assert last[-3:] == ["--no-binary", "mmcv", "mmcv==2.2.0"]
    assert {"MMCV_WITH_OPS": "1", "FORCE_CUDA": "0"}.items() <= environment.items()
    assert int(environment["MAX_JOBS"]) >= 1


def test_a_missing_compiler_is_said_before_anything_is_downloaded(monkeypatch, capsys, calls):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build_mmcv.main() == 2
    expected = "error: mmcv needs a C++ compiler, and there is no g++: install it (Debian: apt install g++)\n"
    assert capsys.readouterr().err == expected
    assert calls == []


def test_a_failed_installation_is_named(monkeypatch, capsys, calls):
    monkeypatch.setattr(build_mmcv, "check_tools", lambda cuda: None)
    assert build_mmcv.main() == 2
    assert capsys.readouterr().err == "error: mmcv is built but does not load: No module named 'mmcv'\n"
    monkeypatch.setattr(build_mmcv.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert build_mmcv.main() == 2
    assert capsys.readouterr().err.startswith("error: pip install setuptools<81 wheel ninja addict")


def test_a_broken_mmcv_counts_as_missing(tmp_path, monkeypatch):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").write_text("__version__ = '2.2.0'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert build_mmcv.installed(cuda=False) == ("", "ModuleNotFoundError: No module named 'mmcv.ops'")
    (tmp_path / "mmcv" / "ops.py").write_text("def get_compiling_cuda_version(): return 'not available'\n")
    assert build_mmcv.installed(cuda=False) == ("2.2.0", "")
    assert build_mmcv.installed(cuda=True) == ("", "it is built without CUDA")
