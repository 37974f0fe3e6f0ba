"""Two reshapes, one after the other: only the last shape matters."""

from __future__ import annotations

from typing import Any

from torch import fx

from fxopt.ir.pattern import Builder, Match, OpNames, P, Refusal, Rule


class CollapseReshapes(Rule):
    """reshape(reshape(x, first), second)  ->  reshape(x, second)"""

    shares_inner = True

    def pattern(self, op: OpNames, /, x: P, first: P, second: P) -> P:
        """Two reshapes."""
        return op.reshape(op.reshape(x, first), second)

    def check(self, match: Match, /, x: fx.Node, first: Any, second: Any) -> Refusal | None:
        """The last shape does not copy sizes of the one between."""
        if isinstance(second, fx.Node):
            return Refusal("the shape {} is computed at run time and may hold a 0, a size of the value between", second)
        return None

    def replace(self, b: Builder, /, x: fx.Node, first: Any, second: Any) -> fx.Node:
        """One reshape."""
        return b.reshape(x, second)
