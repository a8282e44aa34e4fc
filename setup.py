"""What pyproject.toml cannot say: conf/ becomes part of the package, and extras are the requirement files."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = ("export", "app", "hub", "ray", "sweep", "timm", "eval", "import", "notebooks", "bench", "docs", "dev")


def requirements(extra: str) -> list[str]:
    """The lines of a requirement file and of those it includes, but for requirements.txt, which every extra adds to."""
    found: list[str] = []
    for line in Path(f"requirements-{extra}.txt").read_text(encoding="utf-8").splitlines():
        requirement = line.partition("#")[0].strip()
        if requirement.startswith("-r requirements-"):
            found += requirements(requirement.removeprefix("-r requirements-").removesuffix(".txt"))
        elif requirement and not requirement.startswith("-r"):
            found.append(requirement)
    return found


setup(
    packages=[*find_packages(include=["pem_lightning*"]), "pem_lightning.conf"],
    package_dir={"pem_lightning.conf": "conf"},
    extras_require={
        "runtime": [
            "numpy",
            "pillow",
            "onnxruntime",
        ],  # of pem-run: docs/deploy.md says how to install no more than that
        **{extra: requirements(extra) for extra in EXTRAS},
    },
)
