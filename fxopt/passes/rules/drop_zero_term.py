"""Terms that change no value: x - 0.0 and x + (-0.0) give every x back, -0.0 and NaN included."""

from __future__ import annotations

from torch import fx

from fxopt.ir.pattern import Builder, Match, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type


class DropZeroTerm(Rule):
    """x - 0  ->  x"""

    def pattern(self, op: OpNames, /, x: P) -> tuple[P, ...]:
        """x - 0.0, x + (-0.0)"""
        return op.sub(x, 0.0), op.add(x, -0.0)

    def check(self, match: Match, /, x: fx.Node) -> Refusal | None:
        """Neither broadcasting nor promotion changes the type."""
        return changed_type(match, x)

    def replace(self, b: Builder, /, x: fx.Node) -> fx.Node:
        """x"""
        return x
