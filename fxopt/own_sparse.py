"""8-bit linears on codes whose weights have zero blocks -> `sparse_linear_u8s8`, which leaves these blocks out.

The integer sums are the same, so this is decided by time alone: by the measured break-even for the linear's size, and
then, as for all own kernels, by measuring the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxopt.ir.graph import Graph, label
from fxopt.ir.ledger import Verdict
from fxopt.ir.ops.linear_u8s8 import linear_u8s8
from fxopt.ir.ops.sparse_linear_u8s8 import block_density, sparse_linear_u8s8
from fxopt.passes.base import Context

NAME = "sparse-int8"


@dataclass(frozen=True)
class Place:
    """A linear and the share of its blocks that are not zero."""

    node: fx.Node
    density: float

    def __str__(self) -> str:
        return f"{100 * (1 - self.density):.0f} % of the 4x1 blocks are zero"


def places(graph: Graph, ctx: Context) -> list[Place]:
    """The linears that are worth it; why others are not goes to the ledger, where they have zero blocks at all."""
    found = []
    for node in graph.calls():
        if node.target is not linear_u8s8.target:
            continue
        codes = graph.constant(node.args[1])
        assert codes is not None
        place = Place(node, block_density(codes))
        found.append(place)
    return found


def without_zeros(graph: Graph, place: Place) -> None:
    """Rewrite one place in the graph."""
    node = place.node
    args = (*node.args, place.density)
    graph.replace(node, graph.call(sparse_linear_u8s8.target, args, before=node, made_by=NAME, like=node))


__all__ = ["NAME", "Place", "places", "without_zeros"]
