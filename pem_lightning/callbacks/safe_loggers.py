"""Trackers that a training outlives: a lost connection or a full disk costs numbers, not the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import CSVLogger

from pem_lightning.errors import UserError

log = logging.getLogger(__name__)


class Guarded:
    """Mixed into a logger, keeps its errors from ending the training. The first of them is logged as a warning.

    For calls of a tracker's own (`logger.experiment....`) there is `with logger.guard():`.
    """

    _complained = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Log an error instead of raising it."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # trackers raise whatever their network, server or disk does
            if not self._complained:
                self._complained = True
                reason = " ".join(str(error).split()) or "no message"
                log.warning(
                    "%s LOSES NUMBERS (%s: %s): training goes on, and says no more about it",
                    type(self).__name__,
                    type(error).__name__,
                    reason,
                )

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log numbers."""
        self._safely(super().log_metrics, *args, **kwargs)  # type: ignore[misc]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log the configuration."""
        self._safely(super().log_hyperparams, *args, **kwargs)  # type: ignore[misc]

    def log_image(self, *args: Any, **kwargs: Any) -> None:
        """Log pictures, where the tracker can."""
        self._safely(super().log_image, *args, **kwargs)  # type: ignore[misc]

    def log_table(self, *args: Any, **kwargs: Any) -> None:
        """Log a table, where the tracker can."""
        self._safely(super().log_table, *args, **kwargs)  # type: ignore[misc]

    def save(self) -> None:
        """Write what is buffered."""
        self._safely(super().save)  # type: ignore[misc]

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Upload a checkpoint, where that is wanted."""
        self._safely(super().after_save_checkpoint, checkpoint_callback)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        """Close."""
        self._safely(super().finalize, status)  # type: ignore[misc]

    def _safely(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        with self.guard():
            call(*args, **kwargs)


class SafeCSVLogger(Guarded, CSVLogger):
    """Lightning's csv log, guarded."""
