"""8-bit linears on codes whose weights have zero blocks -> `sparse_linear_u8s8`, which leaves these blocks out.

The integer sums are the same, so time alone decides: first the measured break-even for the linear's size, then, as for
all own kernels, the whole is measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from fxopt.cost_model.sparse_int8 import break_even
from fxopt.ir.graph import Graph, hint, provenance, shape_of
from fxopt.ir.ledger import Refusal, Verdict
from fxopt.ir.ops.linear_u8s8 import linear_u8s8
from fxopt.ir.ops.sparse_linear_u8s8 import block_density, sparse_linear_u8s8
from fxopt.passes.base import Context

NAME = "sparse-int8"


@dataclass(frozen=True)
class Place:
    """A linear and the share of its blocks that are not zero."""

    node: fx.Node
    density: float

    @property
    def name(self) -> str:
        """What the user knows the linear by."""
        return provenance(self.node)[0]

    @property
    def reason(self) -> str:
        """Why it is worth it, for the ledger."""
        return f"{_zeros(self.density)}: sparse kernel"


def places(graph: Graph, ctx: Context) -> list[Place]:
    """The linears that are expected to be faster; why others are not goes to the ledger. Types are known."""
    found = []
    for node in graph.calls():
        if node.target is linear_u8s8.target:
            place = _place(graph, node, ctx)
            if isinstance(place, Place):
                found.append(place)
            else:
                ctx.ledger.add(Verdict(NAME, provenance(node)[0], "refused", str(place)))
    return found


def without_zeros(graph: Graph, place: Place) -> None:
    """Rewrite one place in the graph."""
    node = place.node
    args = (*node.args, place.density)
    graph.replace(node, graph.call(sparse_linear_u8s8.target, args, before=node, made_by=NAME, like=node))


def _place(graph: Graph, node: fx.Node, ctx: Context) -> Place | Refusal:
    excluded = ctx.excluded(provenance(node)[0])
    if excluded is not None:
        return excluded
    codes, shape = graph.constant(node.args[1]), shape_of(node.args[0])
    assert codes is not None and shape is not None
    density, rows = block_density(codes), math.prod(hint(dim) for dim in shape[:-1])
    least = break_even(ctx.target.features, codes.shape[1], rows)
    if 1 - density < least:
        text = "{}: below the break-even of {:.0f} % for {} inputs and {} rows"
        return Refusal(text, _zeros(density), 100 * least, codes.shape[1], rows)
    return Place(node, density)


def _zeros(density: float) -> str:
    return f"{100 * (1 - density):.0f} % of the 4x1 blocks are zero"


__all__ = ["NAME", "Place", "places", "without_zeros"]
