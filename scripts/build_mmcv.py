"""Builds mmcv with its operators for the torch that is installed, and installs it. What `make mmcv` does.

    python scripts/build_mmcv.py

For CUDA where torch finds a GPU, else for the CPU. torch stays as it is. MAX_JOBS limits the compilers that run at
once. Exit code 0: mmcv works, 2: something is missing, or the build has failed,
130: stopped.
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

from pem_lightning.types import UserError

MMCV = "mmcv==2.2.0"
BUILD_TOOLS = ("setuptools<81", "wheel", "ninja")  # mmcv's setup.py needs the pkg_resources of older ones
# mmengine is installed without what it requires, for that includes a second OpenCV, which would spoil the first.
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
        print(f"Building {what}: {duration(cuda)}", flush=True)
        start = time.monotonic()
        build(cuda)
        version, problem = installed(cuda)
        if not version:
            raise UserError(f"mmcv is built but does not load: {problem}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped: mmcv is not installed, torch is as it was", file=sys.stderr)
        return 130
    minutes = (time.monotonic() - start) / 60
    print(f"mmcv {version} with operators for {device} is installed, after {minutes:.0f} minutes")
    return 0


def installed(cuda: bool) -> tuple[str, str]:
    """The version of an mmcv whose operators load here, or "", and what is wrong with it. Asked in a fresh process."""
    script = "import mmcv, mmcv.ops; print(mmcv.__version__, mmcv.ops.get_compiling_cuda_version())"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if result.returncode:
        return "", result.stderr.strip().splitlines()[-1]
    version, compiled_with = result.stdout.strip().splitlines()[-1].split(" ", 1)
    if cuda and compiled_with == "not available":
        return "", "it is built without CUDA"
    return version, ""


def duration(cuda: bool) -> str:
    """How long it will take, in words."""
    return "this takes 20 to 40 minutes" if cuda else "this takes some 10 minutes on two cores"


def check_tools(cuda: bool) -> None:
    """Look for all that compiling needs, before anything is downloaded."""
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
    environment = {"MMCV_WITH_OPS": "1", "FORCE_CUDA": str(int(cuda)), "MAX_JOBS": str(jobs()), **os.environ}
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for arguments in (
        [*BUILD_TOOLS, *REQUIREMENTS, f"torch=={torch.__version__}"],  # torch is named so that it stays what it is
        ["--no-deps", "mmengine"],
        # Without the cache: a wheel in it may be for another torch, or without CUDA.
        ["--no-deps", "--no-build-isolation", "--no-cache-dir", "--force-reinstall", "--no-binary", "mmcv", MMCV],
    ):
        if subprocess.run([*pip, *arguments], env=environment).returncode:
            raise UserError(f"pip install {' '.join(arguments)} has failed: mend the reason above, try again")


def jobs() -> int:
    """How many compilers processors and memory allow."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // MEMORY_PER_JOB))


if __name__ == "__main__":
    sys.exit(main())
