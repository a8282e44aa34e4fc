"""What differs between a checkout of the repository and an installed package: places, and names of commands."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
INSTALLED = (PACKAGE / "conf").is_dir()
"""A wheel has conf/ inside the package, the repository beside it."""
CONF = (PACKAGE if INSTALLED else PACKAGE.parent) / "conf"


def install_command(extra: str) -> str:
    """The command that installs the optional packages of one purpose, such as "export"."""
    return f"pip install 'pem-lightning[{extra}]'" if INSTALLED else f"pip install -r requirements-{extra}.txt"


def tool_command(tool: str) -> str:
    """The command that starts a module of `tools`, such as "check_data"."""
    return f"pem {tool.replace('_', '-')}" if INSTALLED else f"python scripts/{tool}.py"


def job_command(job: str) -> str:
    """The command that starts a job, such as "train"."""
    return f"pem {job}" if INSTALLED else f"python {job}.py"
