"""Writing files so that no half-written one is ever taken for a whole one."""

from __future__ import annotations

import os
from pathlib import Path

from pem_lightning.errors import UserError


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file at once: readers never see half of it, and a crash leaves what was there before.

    Args:
        path: its folder is made if need be.
        content: text is written as UTF-8.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another output folder or make room") from error
    return path
