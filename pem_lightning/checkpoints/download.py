"""Published weights by name, downloaded once and checked against the hash that their file names carry."""

from __future__ import annotations

import difflib
import http.client
from collections.abc import Mapping
from typing import Any

import torch

from pem_lightning.errors import UserError

_TORCHVISION = "https://download.pytorch.org/models/"

DOWNLOADS: dict[str, str] = {
    "torchvision/resnet18": _TORCHVISION + "resnet18-f37072fd.pth",
    "torchvision/resnet34": _TORCHVISION + "resnet34-b627a593.pth",
    "torchvision/resnet50": _TORCHVISION + "resnet50-0676ba61.pth",
    "torchvision/resnet101": _TORCHVISION + "resnet101-63fe2227.pth",
    "torchvision/resnet50_v2": _TORCHVISION + "resnet50-11ad3fa6.pth",
    "torchvision/resnet101_v2": _TORCHVISION + "resnet101-cd907fc2.pth",
}
"""What can be had by name: torchvision's IMAGENET1K_V1, and _v2 for those of its newer recipe (IMAGENET1K_V2)."""


def download(name: str) -> Mapping[Any, Any]:
    """Fetch weights into the cache of torch.hub, unless they are there, and read them.

    Args:
        name: one of `DOWNLOADS`.

    Raises:
        UserError: they cannot be had, or are not what the hash says.
    """
    url = DOWNLOADS[name]
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=True, check_hash=True, weights_only=True
        )
    except (OSError, http.client.HTTPException) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"weights={name} cannot be downloaded ({reason}): download {url} elsewhere and say weights=FILE"
        ) from error
    except Exception as error:  # torch.load has no common error for what is wrong with a file
        if "invalid hash" in str(error):
            raise UserError(
                f"weights={name}: what came from {url} has another hash than its name says: try again, or download it "
                "elsewhere and say weights=FILE"
            ) from error
        file = f"{torch.hub.get_dir()}/checkpoints/{url.rsplit('/', 1)[1]}"
        raise UserError(f"weights={name} is damaged in the cache: delete {file} and try again") from error


def unknown_name(source: str) -> UserError:
    """The error for what is neither a file nor a name."""
    close = difflib.get_close_matches(source, DOWNLOADS, n=1)
    hint = f"did you mean {close[0]}?" if close else "see docs/training.md for what is accepted"
    return UserError(f"weights={source} is no file and none of the names {', '.join(DOWNLOADS)}: {hint}")
