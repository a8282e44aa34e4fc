"""Trackers that need a hand to start."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger

log = logging.getLogger(__name__)


def wandb_logger(save_dir: str | Path, **kwargs: Any) -> WandbLogger:
    """Make a Weights & Biases logger that works offline when nobody is logged in, and says how to upload later.

    Args:
        save_dir: where the run's files go.
        kwargs: of `WandbLogger`; `offline` decides by itself when it is not given.
    """
    offline = kwargs.pop("offline", None)
    if offline is None:
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled") or not _has_key()
    if offline:
        os.environ.setdefault("WANDB_MODE", "offline")
        log.warning(
            "wandb: nobody is logged in, so the run is kept offline; upload it with: wandb sync %s/wandb/*", save_dir
        )
    return WandbLogger(save_dir=save_dir, offline=offline, **kwargs)


def log_config(loggers: Iterable[Logger], config: Mapping[str, Any]) -> None:
    """Tell Weights & Biases how the experiment is configured, by names such as `recipe.optimizer.lr`.

    Args:
        loggers: a trainer's; the others are left alone.
        config: plain data.
    """
    flat = dict(_flat(config, ""))
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_hyperparams(flat)


def _flat(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _has_key() -> bool:
    """Whether wandb will find a key. Asking `wandb.login` would start a session that cannot go offline any more."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
