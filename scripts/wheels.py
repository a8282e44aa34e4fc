"""Downloads the wheels for `scripts/gpu_check.py` on a machine without network that has torch: what `make wheels` runs.

    python scripts/wheels.py wheels [--python-version 3.12] [--has numpy scipy ...]

The versions are those of this environment. Exit code 0: done, 1: a wheel is missing, 2: wrong usage.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("pytest", "hypothesis", "beartype")
"""What the tests of a GPU import."""
UNUSED = ("wandb", "tensorboard", "pandas")
"""Of requirements.txt: loggers and reports that the check does without."""
SOURCES = ("antlr4-python3-runtime",)
"""Pure Python that its authors publish without a wheel."""
HAS = ("numpy", "scipy", "pillow", "matplotlib", "opencv-python-headless")
"""What machines with torch mostly have. With them the folder would be five times as large."""
PLATFORMS = ("manylinux2014", "manylinux_2_17", "manylinux_2_24", "manylinux_2_26", "manylinux_2_27", "manylinux_2_28")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("--python-version", default="3.12", help="of the other machine")
    parser.add_argument("--has", nargs="*", default=HAS, metavar="PACKAGE", help="that it has, besides torch")
    options = parser.parse_args(arguments)
    versions = needed(options.has, options.python_version)
    pins = {name: f"{name}=={version}" for name, version in versions.items()}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={options.python_version}"]
    abi = f"cp{options.python_version.replace('.', '')}"
    target += [f"--abi={abi}", "--abi=abi3", "--abi=none", *(f"--platform={name}_x86_64" for name in PLATFORMS)]
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("*.whl"):  # two versions of one package would stop the installation
        if canonicalize_name(old.name.split("-")[0]) in pins:
            old.unlink()
    built = [pin for name, pin in pins.items() if name in SOURCES]
    found = [pin for name, pin in pins.items() if name not in SOURCES]
    for command in (["download", *target, *found], ["wheel", *built]):
        step = [*pip, command[0], "--no-deps", "--no-cache-dir", *command[1:]]
        where = f"--{'dest' if command[0] == 'download' else 'wheel-dir'}={options.folder}"
        if subprocess.run([*step, where]).returncode:
            return 1
    wheels = sorted(options.folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 1e6
    print(
        f"{len(wheels)} wheels, {size:.1f} MB. A machine with torch, {', '.join(options.has)} and this checkout runs:"
    )
    install = f"python3 -m pip install --no-index --no-deps --no-compile --target SITE {options.folder}/*.whl"
    print(f"{install} && PYTHONPATH=SITE python3 scripts/gpu_check.py --output gpu")
    return 0


def needed(has: Iterable[str], python_version: str) -> dict[str, str]:
    """Names and versions of all packages that the check needs beside torch and those that are there.

    Raises:
        SystemExit: one of them is not installed here.
    """
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for text in lines if (line := text.partition("#")[0].strip())]
    roots = [line for line in required if Requirement(line).name not in ("torch", *UNUSED)]
    there = closure(["torch", *has], python_version)
    found = {}
    for name, version in closure([*roots, *TESTS], python_version, there).items():
        if version is None:
            raise SystemExit(f"error: {name} is not installed here: python -m pip install -r requirements-dev.txt")
        found[name] = version
    return found


def closure(requirements: Iterable[str], python_version: str, without: Iterable[str] = ()) -> dict[str, str | None]:
    """Packages and all that they need on Linux, but for what `without` has, with the versions installed here."""
    environment = {"python_version": python_version, "python_full_version": f"{python_version}.0"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    found: dict[str, str | None] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in without or (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                package = distribution(name)
            except PackageNotFoundError:
                found[name] = None
                continue
            found[name] = package.version
            for line in package.requires or ():
                need = Requirement(line)
                if need.marker is None or need.marker.evaluate({**environment, "extra": extra}):
                    waiting.append(need)
    return found


if __name__ == "__main__":
    sys.exit(main())
