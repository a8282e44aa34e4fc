"""Writing checkpoints so that a kill, a power failure or a full disk costs no older one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from pem_lightning.errors import UserError
from pem_lightning.files import replace_file

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the old file, waits for the disk, and only then takes the old one's place.

    (Lightning's own writes into the system's temporary folder first. From there to another disk the file is copied,
    which a kill leaves half done.)

    A checkpoint that cannot be written does not end the training, which may find room for the next one: the old file
    stays, and a warning says so.
    """

    def __init__(self) -> None:
        self._failed: dict[Path, str] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write, or warn."""
        path = Path(path)
        try:
            _write(checkpoint, path)
        except OSError as error:
            self._failed[path] = error.strerror or str(error)
            log.warning(
                "CANNOT WRITE %s (%s): training goes on, the old file is kept, and the next save tries again",
                path,
                self._failed[path],
            )
        else:
            self._failed.pop(path, None)

    def check(self) -> None:
        """Look back at the end of a training.

        Raises:
            UserError: the last attempt to write a checkpoint failed.
        """
        for path, reason in self._failed.items():
            raise UserError(f"the last state of {path} could not be written ({reason}): make room, and resume")


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        with replace_file(path, durable=True) as file:
            torch.save(checkpoint, file)
    except RuntimeError as error:  # PyTorch complains about the state in which the disk's own error left its writer
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
