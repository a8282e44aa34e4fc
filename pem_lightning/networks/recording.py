"""Watching which prototypes a network chooses, without changing what it computes.

Legend: B batch, Q queries, M heads, D channels of a head, P positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pem_lightning.networks.prototype_attention import PrototypeSelection


class Selection(NamedTuple):
    """One layer's choice, as `select_prototypes` made it.

    Attributes:
        positions: of the prototypes.
        similarity: of every prototype and its query: the product that was the highest of all positions.
        background: where a query could not choose; None without masking.
    """

    positions: Int64[Tensor, "B M Q"]
    similarity: Float[Tensor, "B M Q"]
    background: Bool[Tensor, "B Q P"] | None


@contextmanager
def record_selections(network: nn.Module) -> Iterator[list[Selection]]:
    """Fill a list with every layer's choice of prototypes while the context is open.

    It stays empty for a network that chooses none. A compiled network cannot be looked into.
    """
    selections: list[Selection] = []

    def see(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
        _, queries, background = inputs
        prototypes, positions = outputs
        products = (prototypes * queries).float().unflatten(2, (positions.shape[1], -1))  # B Q M D
        selections.append(Selection(positions, products.sum(-1).mT, background))

    handles = [m.register_forward_hook(see) for m in network.modules() if isinstance(m, PrototypeSelection)]
    try:
        yield selections
    finally:
        for handle in handles:
            handle.remove()
