"""Results restricted to chosen classes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

import torch

from pem_lightning.data.targets import VOID_CLASS
from pem_lightning.errors import UserError
from pem_lightning.inference.task import Result
from pem_lightning.types import VOID_ID, DatasetInfo


def find_classes(names: Iterable[str], info: DatasetInfo) -> frozenset[int]:
    """Classes by name.

    Raises:
        UserError: a name is none of them.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in info.class_names:
            close = difflib.get_close_matches(str(name), info.class_names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"there is no class {name}{hint}; choose from: {', '.join(info.class_names)}")
    return frozenset(info.class_names.index(name) for name in wanted)


def only_classes(result: Result, classes: Collection[int]) -> Result:
    """A result without what belongs to other classes."""
    segments = tuple(s for s in result.segments if s.class_id in classes)
    panoptic, semantic = result.panoptic, result.semantic
    if panoptic is not None:
        kept = torch.tensor([s.id for s in segments], dtype=panoptic.dtype)
        panoptic = panoptic.where(torch.isin(panoptic, kept), VOID_ID)
    if semantic is not None:
        semantic = semantic.where(torch.isin(semantic, torch.tensor(sorted(classes))), VOID_CLASS)
    return Result(semantic, panoptic, segments, tuple(i for i in result.instances if i.class_id in classes))
