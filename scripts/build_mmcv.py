"""Builds and installs mmcv with its operators for the installed torch, which stays as it is. What `make mmcv` does.

For CUDA where torch finds a GPU, else for the CPU. MAX_JOBS limits the compilers that run at once. Exit code 0: mmcv
works, 2: something is missing or the build failed, 130: stopped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from pem_lightning.processes import Interrupted, stop_in_order
from pem_lightning.types import UserError

MMCV = "mmcv==2.2.0"
BUILD_TOOLS = ("setuptools<81", "wheel", "ninja")  # mmcv's setup.py needs pkg_resources
# mmengine is installed without its requirements, which include a second OpenCV.
REQUIREMENTS = ("addict", "packaging", "platformdirs", "termcolor", "yapf")
MEMORY_PER_JOB = 2 * 2**30


def main() -> int:
    cuda = torch.cuda.is_available()
    device = "CUDA" if cuda else "the CPU"
    version, _ = installed(cuda)
    if version:
        print(f"mmcv {version} with operators for {device} is already installed")
        return 0
    try:
        check_tools(cuda)
        what = f"{MMCV} with operators for {device} and torch {torch.__version__}"
        duration = "20 to 40 minutes" if cuda else "some 10 minutes on two cores"
        print(f"Building {what}: this takes {duration}", flush=True)
        start = time.monotonic()
        build(cuda)
        version, problem = installed(cuda)
        if not version:
            raise UserError(f"mmcv is built but does not load: {problem}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted) as stop:
        print("stopped: mmcv is not installed, torch is as it was", file=sys.stderr)
        return getattr(stop, "code", 130)
    minutes = (time.monotonic() - start) / 60
    print(f"mmcv {version} with operators for {device} is installed, after {minutes:.0f} minutes")
    return 0


def installed(cuda: bool) -> tuple[str, str]:
    """In a fresh process: the version of an mmcv whose operators load, or "" and what is wrong with it."""
    script = "import mmcv, mmcv.ops; print(mmcv.__version__, mmcv.ops.get_compiling_cuda_version())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if result.returncode:
        return "", result.stderr.strip().splitlines()[-1]
    version, compiled_with = result.stdout.strip().splitlines()[-1].split(" ", 1)
    if cuda and compiled_with == "not available":
        return "", "it is built without CUDA"
    return version, ""


def check_tools(cuda: bool) -> None:
    """Look for what compiling needs, before anything is downloaded."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"mmcv needs a C++ compiler, and there is no {compiler}: install it (Debian: apt install g++)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise UserError("mmcv needs Python's headers: install them (Debian: apt install python3-dev)")
    if cuda:
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            raise UserError(
                f"mmcv for CUDA needs nvcc: install the CUDA toolkit {torch.version.cuda}, and set CUDA_HOME to it"
            )


def build(cuda: bool) -> None:
    """Download, compile, install."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    jobs = max(1, min(os.cpu_count() or 1, memory // MEMORY_PER_JOB))
    environment = {"MMCV_WITH_OPS": "1", "FORCE_CUDA": str(int(cuda)), "MAX_JOBS": str(jobs), **os.environ}
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for arguments in (
        [*BUILD_TOOLS, *REQUIREMENTS, f"torch=={torch.__version__}"],  # named, so that it stays
        ["--no-deps", "mmengine"],
        # A wheel in the cache may be for another torch, or without CUDA.
        ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall", "--no-binary", "mmcv", MMCV],
    ):
        if subprocess.run([*pip, *arguments], env=environment).returncode:
            raise UserError(f"pip install {' '.join(arguments)} has failed: mend the reason above, try again")


if __name__ == "__main__":
    with stop_in_order():
        sys.exit(main())
