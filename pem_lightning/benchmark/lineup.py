"""Who takes part in a benchmark, by name, and how each is built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from pem_lightning.benchmark.contestants import (
    Contestant,
    Fast,
    Library,
    PEMContestant,
    Straightforward,
    choose_threshold,
    count_kept,
    fast_name,
    library_name,
    straightforward_name,
)
from pem_lightning.benchmark.memory import Memory, measure_own
from pem_lightning.benchmark.peers import build_peer, import_transformers
from pem_lightning.benchmark.settings import Settings, load_images
from pem_lightning.benchmark.weights import Weights, checkpoint_weights, random_weights
from pem_lightning.types import UserError


class Entrant(NamedTuple):
    """Someone who is asked to take part.

    Attributes:
        build: makes the contestant, on its device.
        optional: may fail without spoiling the benchmark, because a library or the device may not be up to it.
    """

    build: Callable[[], Contestant]
    optional: bool = False


def line_up(settings: Settings, *, share: bool = True) -> dict[str, Entrant]:
    """Name everyone who is asked to take part, without building them.

    Args:
        settings: of the benchmark.
        share: keep a backbone's network for all its paths, instead of building it anew for each.
    """
    lineup: dict[str, Entrant] = {}
    for backbone, weights in _sources(settings).items():
        lineup |= _paths(backbone, cache(weights) if share else weights, settings)
    for peer in settings.peer_names:
        for precision in settings.precisions:
            build = partial(build_peer, peer, precision, settings.size, device=settings.torch_device)
            lineup[f"{peer} {precision}"] = Entrant(build, optional=True)
    return lineup


def _sources(settings: Settings) -> dict[str, Callable[[], Weights]]:
    """Backbone -> how to make its network."""
    device, checkpoint = settings.torch_device, settings.checkpoint
    if checkpoint is not None:
        return {checkpoint_weights(checkpoint).backbone: lambda: checkpoint_weights(checkpoint).to(device)}

    def random(backbone: str) -> Callable[[], Weights]:
        return lambda: random_weights(backbone).to(device)

    return {backbone: random(backbone) for backbone in settings.backbones}


def _paths(backbone: str, weights: Callable[[], Weights], settings: Settings) -> dict[str, Entrant]:
    """Our own paths through one network."""

    def fast(precision: str, compile: str | None) -> Callable[[], Contestant]:
        return lambda: Fast(weights(), precision, compile)

    paths = {
        "straightforward": {straightforward_name(backbone): Entrant(lambda: Straightforward(weights()))},
        "library": {library_name(backbone): Entrant(lambda: Library(weights()))},
        "fast": {},
    }
    for precision in settings.precisions:
        for mode in (None if name == "none" else name for name in settings.compile):
            optional = precision != "float32" or mode is not None
            paths["fast"][fast_name(backbone, precision, mode)] = Entrant(fast(precision, mode), optional)
    return {name: entrant for kind in settings.contestants for name, entrant in paths[kind].items()}


def build_all(
    lineup: Mapping[str, Entrant],
    images: Float[Tensor, "B 3 H W"],
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[list[Contestant], dict[str, str]]:
    """Build the contestants, and try each once.

    Returns:
        Those that work, and why others do not.
    """
    contestants: list[Contestant] = []
    skipped: dict[str, str] = {}
    thresholds: dict[str, float] = {}
    for name, entrant in lineup.items():
        say(f"building {name}")
        try:
            contestant = entrant.build()
            output = contestant.run(images)
        except Exception as error:  # whatever a library or torch.compile raises
            if not entrant.optional:
                raise
            reason = str(error) if isinstance(error, UserError) else _describe(error)
            if reason not in skipped.values():
                say(f"skipped {name}: {reason}")
            skipped[name] = reason
        else:
            logits = contestant.class_logits(output)
            if logits is not None:
                _choose_threshold(contestant, logits, thresholds, settings.kept_queries)
            contestants.append(contestant)
    return contestants, skipped


def _choose_threshold(
    contestant: Contestant, logits: Float[Tensor, "B Q _"], thresholds: dict[str, float], wanted: int
) -> None:
    """With random weights, leave panoptic post-processing `wanted` queries; a backbone's paths share a threshold."""
    if contestant.source == "random":
        group = contestant.baseline if isinstance(contestant, PEMContestant) else contestant.name
        thresholds.setdefault(group, choose_threshold(logits, wanted))
        contestant.threshold = thresholds[group]
    contestant.kept_queries = count_kept(logits, contestant.threshold)


def measure_memory(settings: Settings, name: str, threshold: float) -> Memory:
    """Measure one contestant in this process, which must be fresh.

    Raises:
        UserError: nobody has the name.
    """
    device = settings.torch_device
    lineup = line_up(settings, share=False)
    if name not in lineup:
        raise UserError(f"--measure-memory {name!r}: choose of {', '.join(lineup)}")
    if name.split()[0] in settings.peer_names:
        import_transformers()

    def job() -> None:
        contestant = lineup[name].build()
        contestant.threshold = threshold
        contestant.run(load_images(settings))

    return measure_own(job, device)


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")


def set_threads(threads: int | None) -> None:
    """Set PyTorch's number of threads, if one is asked for."""
    if threads is not None:
        torch.set_num_threads(threads)
