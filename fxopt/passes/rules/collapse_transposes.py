"""Two transposes, one after the other; together they may do nothing."""

from __future__ import annotations

from torch import fx

from fxopt.ir.pattern import Builder, OpNames, P, Rule

Perm = tuple[int, ...]


class CollapseTransposes(Rule):
    """transpose(transpose(x, first), second)  ->  transpose(x, first[second])"""

    shares_inner = True  # still one transpose instead of two in a row

    def pattern(self, op: OpNames, /, x: P, first: P, second: P) -> P:
        """Two transposes."""
        return op.transpose(op.transpose(x, first), second)

    def replace(self, b: Builder, /, x: fx.Node, first: Perm, second: Perm) -> fx.Node:
        """One transpose."""
        return b.transpose(x, [first[axis] for axis in second])
