"""Remove operators and constants that no result needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fxopt.ir.graph import Graph
from fxopt.passes.base import Context, ExactPass


@dataclass(frozen=True)
class EliminateDeadCode(ExactPass):
    """Remove operators and constants that no result needs."""

    enters_bodies: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> int:
        """Walk back from the results once; inputs stay, and so do operators with an effect."""
        return graph.prune()
