"""Products, quotients and powers with one: exact for every value."""

from __future__ import annotations

from torch import fx

from fxopt.ir.pattern import Builder, Match, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type


class DropUnitFactor(Rule):
    """x * 1  ->  x"""

    def pattern(self, op: OpNames, /, x: P) -> tuple[P, ...]:
        """x * 1, x / 1, x ** 1"""
        return op.mul(x, 1), op.div(x, 1), op.pow(x, 1)

    def check(self, match: Match, /, x: fx.Node) -> Refusal | None:
        """Neither broadcasting nor promotion changes the type."""
        return changed_type(match, x)

    def replace(self, b: Builder, /, x: fx.Node) -> fx.Node:
        """x"""
        return x
