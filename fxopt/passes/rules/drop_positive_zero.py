"""x + 0.0: exact for integers; for floating-point numbers it turns -0.0 into 0.0, and 1 / x then has another sign."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxopt.ir.pattern import Builder, Match, OpNames, P, Refusal, Rule
from fxopt.passes.rules.checks import changed_type


@dataclass(frozen=True)
class DropPositiveZero(Rule):
    """x + 0  ->  x"""

    signed_zeros: bool = True  # False: nobody cares for the sign of a zero

    def pattern(self, op: OpNames, /, x: P) -> tuple[P, ...]:
        """x + 0.0, x - (-0.0)"""
        return op.add(x, 0.0), op.sub(x, -0.0)

    def check(self, match: Match, /, x: fx.Node) -> Refusal | None:
        """Integers, or the caller allows it; neither broadcasting nor promotion changes the type."""
        changed, dtype = changed_type(match, x), match.dtype(x)
        if changed is not None or not self.signed_zeros or (dtype is not None and not dtype.is_floating_point):
            return changed
        return Refusal("x + 0.0 turns -0.0 into 0.0; allow it with signed_zeros=false")

    def replace(self, b: Builder, /, x: fx.Node) -> fx.Node:
        """x"""
        return x
